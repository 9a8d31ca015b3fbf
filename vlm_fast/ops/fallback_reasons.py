"""Why no kernel serves a call: what the process does, the tensor's device, dtype and layout."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_fast.fallback import DISABLED, switches
from vlm_fast.kernels._triton import AVAILABLE
from vlm_fast.ops.transforms import constant_while_compiling, in_functorch, refuse_forward_mode

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def no_kernel_for(x: Tensor) -> str | None:
    """None, or why no kernel takes a tensor: its dtype or its layout."""
    if x.dtype not in FLOATS:
        return f"{x.dtype} has no kernels here (float32, bfloat16 and float16 have)"
    if x.layout is not torch.strided or x.is_nested:
        return f"the tensor is not dense (layout {x.layout})"
    return None


def why_not_now(name: str, first: Tensor) -> str | None:
    """None, or why op ``name`` takes no kernel now for a call with this first tensor.

    Raises:
        RuntimeError: in forward-mode AD.
    """
    if switches.disabled:
        return DISABLED
    if first.is_cuda:
        if not AVAILABLE:
            return "Triton is not installed"
    elif not (first.is_cpu or first.is_meta):
        return f"device {first.device.type!r} has no kernels here"
    if _is_exporting():
        return "an exported program holds plain PyTorch"
    if torch.jit.is_tracing():
        return "a program that torch.jit.trace records holds plain PyTorch"
    if in_functorch():
        refuse_forward_mode(name)  # jvp is refused; the other transforms are served
        return "inside a torch.func transform"
    return None


@constant_while_compiling  # Dynamo of torch 2.11 takes every compilation for an export
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()
