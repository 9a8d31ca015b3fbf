"""``act(gate) * up`` of a gated MLP and its gradient; a program takes BLOCK elements.

``count`` is specialized: if the compiler knows that it is a multiple of 16, the mask is the same
for eight neighbouring elements, and loads and stores are of 128 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._activation import value_and_slope
from ._launcher import Config, kernel, runs_triton
from ._sizes import cdiv
from ._triton import tl, triton
from .mlp import activate, activation_backward


@kernel(Config({"BLOCK": 1024}, num_warps=4))
@triton.jit
def gated_activation_kernel(
    gate_ptr, up_ptr, h_ptr,  # (count,)
    count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value, _ = value_and_slope(gate, ACTIVATION)
    value = value.to(h_ptr.dtype.element_ty).to(tl.float32)  # rounded, as in plain PyTorch
    tl.store(h_ptr + at, (value * up).to(h_ptr.dtype.element_ty), mask=inside)


@kernel(Config({"BLOCK": 1024}, num_warps=4))
@triton.jit
def gated_activation_backward_kernel(
    gate_ptr, up_ptr, dh_ptr,  # (count,)
    dgate_ptr, dup_ptr,  # (count,); dup may be dh
    h_ptr,  # (count,) or None
    count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value, slope = value_and_slope(gate, ACTIVATION)
    value = value.to(dup_ptr.dtype.element_ty).to(tl.float32)
    dgate = dh * up * slope
    if ACTIVATION == "relu":
        dgate = tl.where(slope == 0.0, 0.0, dgate)  # not Inf * 0 = NaN
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + at, (dh * value).to(dup_ptr.dtype.element_ty), mask=inside)
    if h_ptr is not None:
        tl.store(h_ptr + at, (value * up).to(h_ptr.dtype.element_ty), mask=inside)


def gated_activation(
    gate: Tensor, up: Tensor, activation: str, *, overwrite: bool = False
) -> Tensor:
    """``act(gate) * up``; gate and up have one shape and are contiguous.

    ``overwrite`` allows the result to be written over gate.
    """
    if not runs_triton(gate):
        return activate(gate, activation, overwrite=overwrite).mul_(up)
    h = gate if overwrite else torch.empty_like(gate)
    count = gate.numel()
    gated_activation_kernel(
        lambda blocks: (cdiv(count, blocks["BLOCK"]),), gate, up, h, count, activation
    )
    return h


def gated_activation_backward(
    gate: Tensor, up: Tensor, dh: Tensor, activation: str, *, want_h: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return dgate, dup (written over dh) and, if wanted, h; all ``(rows, cols)``, contiguous."""
    if not runs_triton(gate):
        value = activate(gate, activation)
        dgate = activation_backward(dh * up, gate, activation)
        dup = dh.mul_(value)
        return dgate, dup, value.mul_(up) if want_h else None
    dgate, h = torch.empty_like(dh), torch.empty_like(dh) if want_h else None
    count = gate.numel()
    gated_activation_backward_kernel(
        lambda blocks: (cdiv(count, blocks["BLOCK"]),),
        gate, up, dh, dgate, dh, h, count, activation,
    )  # fmt: skip
    return dgate, dh, h
