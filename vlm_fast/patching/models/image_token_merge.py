"""Patch of the merge of image features into ``inputs_embeds``, for models of transformers.

It serves every model whose forward calls ``get_placeholder_mask`` and then ``masked_scatter``. The
mask is computed as the model's own method does it (see `placeholder_masks`), but it is a tensor
subclass: ``inputs_embeds.masked_scatter(mask, features)`` then runs
`vlm_fast.ops.merge_image_tokens`, which counts the placeholders on the device where the model's
method waits for the host. The model's forward itself is not replaced.
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

from vlm_fast.fallback import switches
from vlm_fast.modules.parameter_access.original_code import names_used_by
from vlm_fast.ops.image_token_rows import check_count
from vlm_fast.ops.merge_image_tokens import merge_image_tokens
from vlm_fast.ops.transforms import constant_while_compiling
from vlm_fast.patching.deferred_tensor import DeferredTensor
from vlm_fast.patching.patched_module import PatchedModule
from vlm_fast.patching.placeholder_masks import MaskSpec, UnknownMaskMethod, probe_mask_method


class PlaceholderMask(DeferredTensor):
    """A mask of placeholder tokens whose ``masked_scatter`` is the fused merge.

    The host may not have compared the number of placeholders with that of the features yet. The
    merge does so on the device; any other function that gets the mask has it counted first.
    """

    rows: int | None = None  # the number of placeholders that there must be, while not yet counted

    @classmethod
    def shortcut(cls, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is Tensor.masked_scatter and not kwargs and isinstance(args[1], cls):
            return _masked_scatter(*args)
        if func is Tensor.to and isinstance(args[0], cls):
            moved = func(*args, **kwargs)
            if moved.dtype == torch.bool:
                return _as_placeholder_mask(moved, args[0].rows)
        return None

    @classmethod
    def resolve(cls, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if not torch.compiler.is_compiling() and func.__name__ != "__get__":  # e.g. mask.shape
            for mask in tree_leaves((args, kwargs)):
                if isinstance(mask, cls):
                    _count(mask)
        return args, kwargs


def _as_placeholder_mask(mask: Tensor, rows: int | None) -> Tensor:
    mask = mask.as_subclass(PlaceholderMask)
    if not torch.compiler.is_compiling():
        mask.rows = rows
    return mask


def _count(mask: PlaceholderMask) -> None:
    rows, mask.rows = mask.rows, None
    if rows is not None:
        check_count("get_placeholder_mask", "features", rows, mask[..., 0].sum())


def _masked_scatter(embeds: Tensor, mask: PlaceholderMask, source: Tensor) -> Tensor:
    hidden = embeds.shape[-1] if embeds.ndim == 3 else 0
    fits = hidden and mask.ndim == 3 and mask.shape[:2] == embeds.shape[:2]
    if not fits or source.dtype != embeds.dtype or source.numel() % hidden:
        if not torch.compiler.is_compiling():
            _count(mask)
        return embeds.masked_scatter(mask, source)
    if source.ndim < 2 or source.shape[-1] != hidden:
        source = source.reshape(-1, hidden)
    merged = merge_image_tokens(embeds, source, mask[..., 0])
    if not torch.compiler.is_compiling():
        mask.rows = None
    return merged


def would_sync(tensor: Tensor) -> bool:
    """Whether to avoid reading a value of this tensor, because the host would wait for it."""
    return tensor.is_cuda and not switches.strict


class FusedMerge(PatchedModule):
    """Replaces ``get_placeholder_mask`` of a model, so that its merge runs as one op.

    The settings are a `MaskSpec`.
    """

    handles_children = False
    mirrored_methods: ClassVar[tuple[str, ...]] = ()  # its method was probed

    def after_swap(self: Any) -> None:
        _MODELS[id(self)] = self

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in ("get_image_features", "get_video_features"):
            if "patch_spec" in vars(cls) and hasattr(cls, name):  # a swapped class
                setattr(cls, name, _with_output_hooks(cls, name))

    def get_placeholder_mask(
        self, input_ids: Tensor | None, inputs_embeds: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        spec: MaskSpec = self.patch_spec.settings
        original = super().get_placeholder_mask  # type: ignore[misc]
        given = {**dict(zip(spec.arguments, args, strict=False)), **kwargs}
        plain = type(inputs_embeds) is Tensor and type(input_ids) in (Tensor, type(None))
        # A FakeTensor or DTensor cannot change its type. An argument given twice is an error.
        if not plain or len(given) != len(args) + len(kwargs):
            return original(input_ids, inputs_embeds, *args, **kwargs)
        if input_ids is None:  # placeholders are found by their embeddings
            found = original(input_ids, inputs_embeds, *args, **kwargs)
            masks = list(found) if isinstance(found, tuple) else [found]
        else:
            masks = spec.make_masks(self, input_ids, inputs_embeds, given)
        for name, index in spec.counted_features:
            features = given.get(name)
            if features is None:
                continue
            rows = None  # the merge counts
            if input_ids is not None and not torch.compiler.is_compiling():
                rows = _rows_to_count(masks[index], features, inputs_embeds)
                if rows == COUNT_MISMATCH:  # the original raises the error
                    return original(input_ids, inputs_embeds, *args, **kwargs)
            masks[index] = _as_placeholder_mask(masks[index], rows)
        return tuple(masks) if len(masks) > 1 else masks[0]


COUNT_MISMATCH = -1


def _rows_to_count(mask: Tensor, features: Tensor, embeds: Tensor) -> int | None:
    """How many placeholders the merge must find; None if the host has counted them already.

    `COUNT_MISMATCH` if their number is wrong.
    """
    # While torch.jit traces, sizes are tensors.
    rows, rest = divmod(int(features.numel()), int(embeds.shape[-1]))
    if rest:
        return COUNT_MISMATCH
    if would_sync(embeds):
        return rows
    return None if int(mask[..., 0].sum()) == rows else COUNT_MISMATCH


def _with_output_hooks(cls: Any, name: str) -> Callable[..., Any]:
    """A method of a patched class that installs transformers' output hooks while compiling."""
    own, base = (
        vars(cls).get(name),
        cls.patch_spec.base,
    )  # the mixin's; else the base's at the call

    @functools.wraps(getattr(cls, name))
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            _install_output_hooks(id(self))
        return (own or getattr(base, name))(self, *args, **kwargs)

    return call


# By id(): in torch 2.11 a function that runs during compilation cannot take a module.
_MODELS: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


@constant_while_compiling
def _install_output_hooks(model_id: int) -> None:
    """Install transformers' output hooks in the children of a model, while it is compiled.

    transformers does this at the first call that collects the outputs of a tower's layers, under a
    lock, which a compiled graph cannot contain.
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
    """The `MaskSpec` of a model, why its merge is not patched, or None if it merges nothing."""
    kind = type(module)
    try:
        return _recognise(kind)
    except UnknownMaskMethod as reason:
        return f"get_placeholder_mask{_release(kind)} {reason}"
    except Exception as error:  # an unknown method may raise anything
        why = f"{type(error).__name__}: {error}"
        return f"get_placeholder_mask{_release(kind)} cannot be probed: {why}"


def _recognise(kind: type[nn.Module]) -> MaskSpec | str | None:
    method = getattr(kind, "get_placeholder_mask", None)
    names = names_used_by(kind.forward)
    if method is None:
        if not hasattr(kind, "get_input_embeddings") or names.isdisjoint(_MERGES):
            return None
        return f"its forward{_release(kind)} merges by itself, without get_placeholder_mask"
    if "masked_scatter" not in names:
        return None  # a wrapper around the model that merges
    if "get_placeholder_mask" not in names:
        return f"its forward{_release(kind)} makes its own mask, not by get_placeholder_mask"
    if "expand_as" in names:
        return f"its forward{_release(kind)} expands the mask"
    return probe_mask_method(inspect.unwrap(method))


# Names that a forward uses if it merges features by itself.
_MERGES = (
    "masked_scatter", "inputs_merger", "gather_continuous_embeddings",
    "_merge_input_ids_with_audio_features", "_merge_input_ids_with_image_features",
)  # fmt: skip


def _release(kind: type) -> str:
    if not kind.__module__.startswith("transformers."):
        return ""
    return f" (transformers {getattr(sys.modules['transformers'], '__version__', '')})"
