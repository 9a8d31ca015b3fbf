"""Does calling a module do more than the forward of its class: hooks, wrappers, replaced code?"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _nn_module

from vlm_fast.modules.parameter_access.original_code import (
    class_before_patch,
    why_not_original_code,
)

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = "global module hooks are set"
MAPS_REQUESTED = "attention maps were requested, which no kernel forms"
FORWARD_REPLACED = "its forward has been replaced (accelerate or another wrapper)"


def has_replaced_forward(module: nn.Module) -> bool:
    """Whether an instance attribute ``forward`` hides the forward of the module's class.

    accelerate leaves such an attribute after removing its hooks; if it is the forward of the class
    itself, it does not count.
    """
    own = module.__dict__.get("forward")
    if own is None:
        return False
    return getattr(own, "__func__", None) is not type(module).forward or own.__self__ is not module


def why_call_does_more(module: nn.Module, *, ignore_forward_hooks: bool = False) -> str | None:
    """Why calling ``module`` does more than the original forward of its class, or None."""
    own = module.__dict__
    reason = why_not_original_code(class_before_patch(module))
    if reason is not None:
        return reason
    if has_replaced_forward(module):
        return FORWARD_REPLACED
    if own.get("_compiled_call_impl") is not None:
        return "it is compiled on its own"
    if (
        (own["_forward_hooks"] and not ignore_forward_hooks)
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        return "it has hooks"
    if (
        _nn_module._global_forward_hooks
        or _nn_module._global_forward_pre_hooks
        or _nn_module._global_backward_hooks
        or _nn_module._global_backward_pre_hooks
    ):
        return GLOBAL_HOOKS
    return None


def why_no_extra_arguments(module: nn.Module) -> str | None:
    """Why a module can only be called with the arguments of its original class, or None.

    A foreign hook or a replaced forward expects those. Hooks of this package, torch.distributed
    and DeepSpeed do not look at arguments by name.
    """
    own = module.__dict__
    for kind in HOOKS[:2]:
        for hook in own[kind].values():
            origin = getattr(getattr(hook, "func", hook), "__module__", "") or ""
            known = origin.startswith(("vlm_fast.", "torch.distributed.", "deepspeed."))
            if not known and getattr(hook, "__name__", "") != "output_capturing_hook":
                return "it has hooks"
    return FORWARD_REPLACED if has_replaced_forward(module) else None


def only_output_hooks(hooks: dict[int, Any]) -> bool:
    """Whether all of these hooks only collect outputs for a caller of a transformers model.

    transformers leaves these hooks in place after the first call that collects outputs.
    """
    return all(getattr(h, "__name__", "") == "output_capturing_hook" for h in hooks.values())


def collects_attentions() -> bool:
    """Whether a caller of a transformers model is collecting attention maps right now."""
    return _is_collecting("attentions", "cross_attentions")


def collects_hidden_states() -> bool:
    """Whether a caller of a transformers model is collecting hidden states right now."""
    return _is_collecting("hidden_states")


def _is_collecting(*keys: str) -> bool:
    capturing = sys.modules.get("transformers.utils.output_capturing")
    if capturing is None:
        return False
    collector = capturing._active_collector  # a ContextVar, which Dynamo cannot read
    collected = collector.global_var if torch.compiler.is_compiling() else collector.get()
    return bool(collected) and not collected.keys().isdisjoint(keys)


def unwrap_checkpoint(layer: Any) -> Any:
    """The layer inside torch's wrapper for activation checkpointing, or ``layer`` itself."""
    return getattr(layer, "_checkpoint_wrapped_module", layer)
