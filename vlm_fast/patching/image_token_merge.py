"""The merge of image features into ``inputs_embeds``, in models that ask `get_placeholder_mask`.

The model's own `get_placeholder_mask` runs, on ids of a tensor type that remembers what it is:
whatever mask comes out, ``inputs_embeds.masked_scatter(mask, features)`` is then served by
`vlm_fast.ops.merge_image_tokens`, and the count check in between does not wait for the device
(the merge checks the same count there). No model's forward is restated.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.patching.class_swap import Patched
from vlm_fast.policy import policy
from vlm_fast.registration import constant_while_compiling

UNREAD = "(not read from the device)"


class PlaceholderMask(Tensor):
    """Ids, the mask made of them, and counts of that mask: what a merge is decided by.

    Only the few operations that lead from ids to mask and count keep the type; everything else
    sees and returns plain tensors.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.masked_scatter and not kwargs:
                return _masked_scatter(*args)
            if func is Tensor.__format__ and _would_wait(args[0]):  # the message of the count check
                return UNREAD
            if func is Tensor.__format__:  # of a number; of a subclass it would be its repr
                return format(args[0].as_subclass(Tensor), *args[1:])
            if func is Tensor.item and args[0].dtype == torch.bool and _would_wait(args[0]):
                return True  # its verdict
            result = func(*args, **kwargs)
            return result.as_subclass(PlaceholderMask) if func in _LEADING_TO_MASK else result


_LEADING_TO_MASK = {
    Tensor.__eq__, Tensor.eq, Tensor.all, Tensor.__and__, Tensor.__or__, Tensor.unsqueeze,
    Tensor.to, Tensor.sum, Tensor.mul, Tensor.__mul__, Tensor._is_all_true,
}  # fmt: skip


def _would_wait(count: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return True  # a graph break, and a synchronisation at every run of the graph
    return count.is_cuda and not policy.strict


# Functions that see every merge's embeds, mask and features; `vlm_fast.verify` looks through one.
OBSERVERS: list[Callable[[Tensor, Tensor, Tensor], None]] = []


def _masked_scatter(embeds: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    if embeds.ndim != 3 or mask.shape != (*embeds.shape[:2], 1) or mask.dtype != torch.bool:
        return embeds.masked_scatter(mask, source)
    if source.dtype != embeds.dtype or source.ndim < 2 or source.shape[-1] != embeds.shape[-1]:
        return embeds.masked_scatter(mask, source)
    mask = mask.squeeze(-1)
    for observe in OBSERVERS:
        observe(embeds, mask, source)
    return ops.merge_image_tokens(embeds, source, mask)


class FusedMerge(Patched):
    """A model whose placeholder masks lead to the fused merge."""

    covers = False
    restates: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        for name in ("get_image_features", "get_video_features"):
            if "patch" in vars(cls) and hasattr(cls, name):  # a class that was made for a model
                setattr(cls, name, _hooks_first(cls, name))

    def get_placeholder_mask(
        self, input_ids: Tensor | None, inputs_embeds: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        compared = inputs_embeds.detach() if input_ids is None else input_ids
        # Without features nothing is counted; a FakeTensor or DTensor cannot change its type.
        if any(f is not None for f in (*args, *kwargs.values())) and type(compared) is Tensor:
            compared = compared.as_subclass(PlaceholderMask)
            if input_ids is None:
                inputs_embeds = compared
            else:
                input_ids = compared
        return super().get_placeholder_mask(  # type: ignore[misc]
            input_ids, inputs_embeds, *args, **kwargs
        )


def _hooks_first(cls: Any, name: str) -> Callable[..., Any]:
    own, base = vars(cls).get(name), cls.patch.base  # a mixin's, or the base's as it is at the call

    @functools.wraps(getattr(cls, name))
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            _install_output_hooks(self)
        return (own or getattr(base, name))(self, *args, **kwargs)

    return call


@constant_while_compiling
def _install_output_hooks(model: Any) -> None:
    """What transformers does at the first call of a tower that is asked for its layers' outputs.

    It holds a lock meanwhile, which no graph can: so this runs while the graph is made.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    if capturing is None:
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


def recognise(module: nn.Module) -> tuple[()] | str | None:
    """Empty recipe, the reason why a candidate is none, or None for no candidate."""
    method = getattr(type(module), "get_placeholder_mask", None)
    if method is None:
        return None
    forward = _names(type(module).forward)
    if "masked_scatter" not in forward:
        return None  # a wrapper that hands the question on to the model inside
    if "get_placeholder_mask" not in forward:
        return "its forward makes its own mask, not by get_placeholder_mask"
    parameters = list(inspect.signature(method).parameters)
    if parameters[1:4] != ["input_ids", "inputs_embeds", "image_features"]:
        return f"get_placeholder_mask takes {', '.join(parameters[1:])}"
    if "expand_as" in _names(method):
        return "its mask is expanded to the hidden size"
    if "torch_compilable_check" not in _names(method):
        return "its feature count is not checked, so the merge may not check it either"
    return ()


def _names(function: Any) -> tuple[str, ...]:
    return inspect.unwrap(function).__code__.co_names
