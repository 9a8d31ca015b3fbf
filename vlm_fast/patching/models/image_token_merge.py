"""The merge of image features into ``inputs_embeds``, in models that ask `get_placeholder_mask`.

The mask is made directly, as the class's own method makes it (`placeholder_forms`). Its tensor type
leads ``inputs_embeds.masked_scatter(mask, features)`` to `vlm_fast.ops.merge_image_tokens`, which
counts on the device what the method counts on the host. No model's forward is restated.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vlm_fast import ops
from vlm_fast.fallback import switches
from vlm_fast.modules.parameter_access.original_code import names_used_by
from vlm_fast.ops.image_tokens import check_count
from vlm_fast.ops.registration import constant_while_compiling
from vlm_fast.patching.class_swap import PatchedModule
from vlm_fast.patching.placeholder_masks import MaskSpec, UnknownMaskMethod, read


class PlaceholderMask(Tensor):
    """A mask of whole rows that leads to the fused merge. To everything else it is a plain tensor.

    Whoever looks at it before the merge has it counted first: it may never come there.
    """

    rows: int | None = None  # of features, while nobody has counted the mask

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.masked_scatter and not kwargs and isinstance(args[1], cls):
                return _masked_scatter(*args)
            if func is Tensor.to and isinstance(args[0], cls):
                moved = func(*args, **kwargs)
                if moved.dtype == torch.bool:
                    return _marked(moved, args[0].rows)
            if not torch.compiler.is_compiling() and func.__name__ != "__get__":  # as a shape
                for mask in tree_leaves((args, kwargs)):
                    if isinstance(mask, cls):
                        _count(mask)
            return func(*args, **kwargs)


def _marked(mask: Tensor, rows: int | None) -> Tensor:
    mask = mask.as_subclass(PlaceholderMask)
    if not torch.compiler.is_compiling():
        mask.rows = rows
    return mask


def _count(mask: PlaceholderMask) -> None:
    rows, mask.rows = mask.rows, None
    if rows is not None:
        check_count("get_placeholder_mask", "features", rows, mask[..., 0].sum())


# Functions that see every merge's embeds, mask and features; `vlm_fast.verify` looks through one.
OBSERVERS: list[Callable[[Tensor, Tensor, Tensor], None]] = []


def _masked_scatter(embeds: Tensor, mask: PlaceholderMask, source: Tensor) -> Tensor:
    hidden = embeds.shape[-1] if embeds.ndim == 3 else 0
    fits = hidden and mask.ndim == 3 and mask.shape[:2] == embeds.shape[:2]
    if not fits or source.dtype != embeds.dtype or source.numel() % hidden:
        if not torch.compiler.is_compiling():
            _count(mask)
        return embeds.masked_scatter(mask, source)
    if source.ndim < 2 or source.shape[-1] != hidden:
        source = source.reshape(-1, hidden)
    rows = mask[..., 0]
    for observe in OBSERVERS:
        observe(embeds, rows, source)
    merged = ops.merge_image_tokens(embeds, source, rows)
    if not torch.compiler.is_compiling():
        mask.rows = None
    return merged


def _would_wait(tensor: Tensor) -> bool:
    """Whether a number that is read from this tensor's device is waited for."""
    return tensor.is_cuda and not switches.strict


class FusedMerge(PatchedModule):
    """A model whose placeholder masks lead to the fused merge. Its recipe is a `MaskSpec`."""

    handles_children = False
    mirrored_methods: ClassVar[tuple[str, ...]] = ()  # its method was asked what it does

    def after_swap(self: Any) -> None:
        _MODELS[id(self)] = self

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in ("get_image_features", "get_video_features"):
            if "patch_spec" in vars(cls) and hasattr(
                cls, name
            ):  # a class that was made for a model
                setattr(cls, name, _hooks_first(cls, name))

    def get_placeholder_mask(
        self, input_ids: Tensor | None, inputs_embeds: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        form: MaskSpec = self.patch_spec.settings
        original = super().get_placeholder_mask  # type: ignore[misc]
        given = {**dict(zip(form.arguments, args, strict=False)), **kwargs}
        plain = type(inputs_embeds) is Tensor and type(input_ids) in (Tensor, type(None))
        # A FakeTensor or DTensor cannot change its type. What is given twice is an error.
        if not plain or len(given) != len(args) + len(kwargs):
            return original(input_ids, inputs_embeds, *args, **kwargs)
        if input_ids is None:  # found by their embeddings
            answer = original(input_ids, inputs_embeds, *args, **kwargs)
            masks = list(answer) if isinstance(answer, tuple) else [answer]
        else:
            masks = form.masks(self, input_ids, inputs_embeds, given)
        for name, index in form.counted:
            features = given.get(name)
            if features is None:
                continue
            rows = None  # left to count
            if input_ids is not None and not torch.compiler.is_compiling():
                rows = _rows_to_count(masks[index], features, inputs_embeds)
                if rows == WRONG:  # which it says
                    return original(input_ids, inputs_embeds, *args, **kwargs)
            masks[index] = _marked(masks[index], rows)
        return tuple(masks) if len(masks) > 1 else masks[0]


WRONG = -1


def _rows_to_count(mask: Tensor, features: Tensor, embeds: Tensor) -> int | None:
    """How many places the mask must turn out to have; None if it has them, `WRONG` if not."""
    # While torch.jit traces, sizes are tensors.
    rows, rest = divmod(int(features.numel()), int(embeds.shape[-1]))
    if rest:
        return WRONG
    if _would_wait(embeds):
        return rows
    return None if int(mask[..., 0].sum()) == rows else WRONG


def _hooks_first(cls: Any, name: str) -> Callable[..., Any]:
    own, base = (
        vars(cls).get(name),
        cls.patch_spec.base,
    )  # a mixin's, or the base's as it is at the call

    @functools.wraps(getattr(cls, name))
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            _install_output_hooks(id(self))
        return (own or getattr(base, name))(self, *args, **kwargs)

    return call


# By identity: a function that runs while a graph is made takes no module, in torch 2.11.
_MODELS: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


@constant_while_compiling
def _install_output_hooks(model_id: int) -> None:
    """What transformers does at the first call of a tower that is asked for its layers' outputs.

    It holds a lock meanwhile, which no graph can: so this runs while the graph is made.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    model = _MODELS.get(model_id)
    if capturing is None or model is None:
        return
    models = sys.modules["transformers.modeling_utils"].PreTrainedModel
    for child in model.children():
        inner = [m for m in child.modules() if isinstance(m, models)]
        hooked = any(getattr(m, "_output_capturing_hooks_installed", False) for m in inner)
        if (
            isinstance(child, models)
            and not hooked
            and child is not getattr(model, "language_model", None)
        ):
            capturing.maybe_install_capturing_hooks(child)


def recognise(module: nn.Module) -> MaskSpec | str | None:
    """The form of its masks, the reason why a candidate is none, or None for no candidate."""
    kind = type(module)
    try:
        return _recognise(kind)
    except UnknownMaskMethod as reason:
        return f"get_placeholder_mask{_release(kind)} {reason}"
    except Exception as error:  # of code that nobody here has read
        why = f"{type(error).__name__}: {error}"
        return f"get_placeholder_mask{_release(kind)} cannot be asked: {why}"


def _recognise(kind: type[nn.Module]) -> MaskSpec | str | None:
    method = getattr(kind, "get_placeholder_mask", None)
    names = names_used_by(kind.forward)
    if method is None:
        if not hasattr(kind, "get_input_embeddings") or names.isdisjoint(_MERGES):
            return None
        return f"its forward{_release(kind)} merges by itself, without get_placeholder_mask"
    if "masked_scatter" not in names:
        return None  # a wrapper that hands the question on to the model inside
    if "get_placeholder_mask" not in names:
        return f"its forward{_release(kind)} makes its own mask, not by get_placeholder_mask"
    if "expand_as" in names:
        return f"its forward{_release(kind)} expands the mask"
    return read(inspect.unwrap(method))


# What forwards call in which features are merged.
_MERGES = (
    "masked_scatter", "inputs_merger", "gather_continuous_embeddings",
    "_merge_input_ids_with_audio_features", "_merge_input_ids_with_image_features",
)  # fmt: skip


def _release(kind: type) -> str:
    if not kind.__module__.startswith("transformers."):
        return ""
    return f" (transformers {getattr(sys.modules['transformers'], '__version__', '')})"
