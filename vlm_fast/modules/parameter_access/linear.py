"""May an op read the weight and bias of a linear directly, instead of calling the linear?

Only if ``F.linear(x, linear.weight, linear.bias)`` is exactly what ``linear(x)`` would compute.
LoRA, hooks, quantization, sharding and offloading all break that, most of them silently. So this is
asked before the first call and after every change, see `remembered`; the answer is a readable
reason.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vlm_fast.modules.parameter_access.module_calls import why_call_does_more
from vlm_fast.modules.parameter_access.sharded_parameters import is_zero3_partitioned

# nn.MultiheadAttention's output projection has the second class; its forward is nn.Linear's.
_LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not_direct(linear: nn.Module) -> str | None:
    """Why ``linear`` does more than its weight and bias say, so that it must be called; or None."""
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
    """Why a kernel cannot read the elements of a parameter, or None if it can."""
    if type(parameter) is not nn.Parameter and type(parameter) is not Tensor:
        return f"{name} is a {type(parameter).__name__}"
    if not torch.compiler.is_compiling() and type(parameter.data) is not Tensor:
        return f"{name} holds a {type(parameter.data).__name__}"
    if is_zero3_partitioned(parameter):
        return f"{name} is partitioned by DeepSpeed ZeRO-3"
    if parameter.is_meta and not _computes_shapes():
        return f"{name} is on the meta device"
    if parameter.layout is not torch.strided:
        return f"{name} has layout {parameter.layout}"
    if parameter.dtype not in _DTYPES:
        return f"{name} has dtype {parameter.dtype}"
    return None


def _computes_shapes() -> bool:
    """Whether the caller works inside ``torch.device("meta")``, so that only shapes are computed.

    Outside it, a parameter on the meta device is one whose values a wrapper keeps elsewhere.
    """
    return not torch.compiler.is_compiling() and torch.get_default_device().type == "meta"
