"""May a linear's parameters be read directly, instead of calling it?

Only if ``F.linear(x, linear.weight, linear.bias)`` is exactly what ``linear(x)`` would do. LoRA,
hooks, quantisation, sharding and offloading all break that, most of them silently, so the question
is asked at every call (a few microseconds) and the answer is a reason one can read.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _nn_module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vlm_fast.fallback import Switch
from vlm_fast.modules.parameter_access.original_code import (
    class_before_patch,
    why_not_original_code,
)

# The second is what nn.MultiheadAttention calls its output projection; its forward is the first's.
_LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_meta_parameters = Switch()
GLOBAL_HOOKS = "global module hooks are set"


def meta_parameters_allowed() -> AbstractContextManager[None]:
    """Within it parameters on the meta device may be read: what a call would do is counted.

    Elsewhere such a parameter is one that a wrapper keeps in another place.
    """
    return _meta_parameters.held()


def why_not_direct(linear: nn.Module) -> str | None:
    """None if the parameters say all that ``linear`` does; else the first reason why not."""
    if type(linear) not in _LINEARS:
        return f"{type(linear).__module__}.{type(linear).__qualname__} is not a plain nn.Linear"
    reason = why_call_does_more(linear)
    if reason is not None:
        return reason
    own = linear.__dict__
    if "weight" in own or "bias" in own:
        return "an attribute hides a parameter"
    parameters = own["_parameters"]
    if parameters.keys() != {"weight", "bias"}:
        return f"its parameters are {sorted(parameters)}, not weight and bias"
    weight, bias = parameters["weight"], parameters["bias"]
    for name, parameter in parameters.items():
        if parameter is None:
            if name == "weight":
                return "it has no weight"
            continue
        reason = why_not_readable(name, parameter)
        if reason is not None:
            return reason
        if parameter.dtype != weight.dtype or parameter.device != weight.device:
            return f"{name} differs from weight in dtype or device"
    if weight.shape != (linear.out_features, linear.in_features):
        return f"weight has shape {tuple(weight.shape)}"
    if bias is not None and bias.shape != (linear.out_features,):
        return f"bias has shape {tuple(bias.shape)}"
    return None


def why_not_readable(name: str, parameter: Tensor) -> str | None:
    """Why the elements of a parameter may not be read directly, or None if they may."""
    if type(parameter) is not nn.Parameter and type(parameter) is not Tensor:
        return f"{name} is a {type(parameter).__name__}"
    if not torch.compiler.is_compiling() and type(parameter.data) is not Tensor:
        return f"{name} holds a {type(parameter.data).__name__}"
    if is_zero3_partitioned(parameter):
        return f"{name} is partitioned by DeepSpeed ZeRO-3"
    if parameter.is_meta and not _meta_parameters.on:
        return f"{name} is on the meta device"
    if parameter.layout is not torch.strided:
        return f"{name} has layout {parameter.layout}"
    if parameter.dtype not in _DTYPES:
        return f"{name} has dtype {parameter.dtype}"
    return None


def is_zero3_partitioned(parameter: Tensor | None) -> bool:
    """Whether DeepSpeed ZeRO-3 holds the parameter, and has not gathered it.

    It gathers those of a module by hooks of that module, which are a reason of their own; only a
    module that was set as a leaf finds those of its children gathered, and no hooks on them.
    """
    if not (hasattr(parameter, "ds_id") or hasattr(parameter, "ds_status")):
        return False
    return getattr(getattr(parameter, "ds_status", None), "name", None) != "AVAILABLE"


def has_replaced_forward(module: nn.Module) -> bool:
    """Whether an attribute stands before the forward of its class.

    When accelerate takes its hooks away, it leaves one that is the same forward.
    """
    own = module.__dict__.get("forward")
    if own is None:
        return False
    return getattr(own, "__func__", None) is not type(module).forward or own.__self__ is not module


def why_call_does_more(module: nn.Module, *, ignore_forward_hooks: bool = False) -> str | None:
    """Why calling ``module`` does more than the forward written in its class, or None."""
    own = module.__dict__
    reason = why_not_original_code(class_before_patch(module))
    if reason is not None:
        return reason
    if has_replaced_forward(module):
        return "its forward has been replaced (accelerate or another wrapper)"
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
