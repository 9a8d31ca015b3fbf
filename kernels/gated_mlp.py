"""``act(gate) * up`` of a gated MLP and its gradient; a program takes BLOCK columns of a row.

``cols`` and ``pitch`` are specialized: if the compiler knows that they are multiples of 16, the
mask is the same for eight neighbouring elements, and loads and stores are of 128 bits.
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
    gate_ptr, up_ptr, pitch,  # (rows, cols), their rows this far apart
    h_ptr,  # (rows, cols)
    cols, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < cols
    at = row * pitch + col
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value, _ = value_and_slope(gate, ACTIVATION)
    value = value.to(h_ptr.dtype.element_ty).to(tl.float32)  # rounded, as in plain PyTorch
    tl.store(h_ptr + row * cols + col, (value * up).to(h_ptr.dtype.element_ty), mask=inside)


@kernel(Config({"BLOCK": 1024}, num_warps=4))
@triton.jit
def gated_activation_backward_kernel(
    gate_ptr, up_ptr, dgate_ptr, dup_ptr, pitch,  # (rows, cols), their rows this far apart
    dh_ptr,  # (rows, cols); dup may be dh
    h_ptr,  # (rows, cols) or None
    cols, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < cols
    at = row * pitch + col
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + row * cols + col, mask=inside, other=0.0).to(tl.float32)
    value, slope = value_and_slope(gate, ACTIVATION)
    value = value.to(dup_ptr.dtype.element_ty).to(tl.float32)
    dgate = dh * up * slope
    if ACTIVATION == "relu":
        dgate = tl.where(slope == 0.0, 0.0, dgate)  # not Inf * 0 = NaN
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + at, (dh * value).to(dup_ptr.dtype.element_ty), mask=inside)
    if h_ptr is not None:
        h = (value * up).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * cols + col, h, mask=inside)


def gated_activation(
    gate: Tensor, up: Tensor, activation: str, *, overwrite: bool = False
) -> Tensor:
    """``act(gate) * up``, contiguous, of matrices with one shape and one pitch.

    ``overwrite`` allows the result to be written over gate, which is then contiguous.
    """
    if not runs_triton(gate):
        return activate(gate, activation, overwrite=overwrite).mul_(up)
    rows, cols = gate.shape
    h = gate if overwrite else gate.new_empty(rows, cols)
    gated_activation_kernel(
        lambda blocks: (rows, cdiv(cols, blocks["BLOCK"])),
        gate, up, gate.stride(0), h, cols, activation,
    )  # fmt: skip
    return h


def gated_activation_backward(
    gate: Tensor, up: Tensor, dh: Tensor, activation: str, *, want_h: bool,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return dgate, dup and, if wanted, h; all ``(rows, cols)``, as is dh, which is contiguous.

    ``into``: memory for dgate and dup with the pitch of gate and up. Without it gate and up are
    contiguous, and dup is written over dh.
    """
    if not runs_triton(gate):
        value = activate(gate, activation)
        dgate = activation_backward(dh * up, gate, activation)
        dup = dh.mul_(value)
        h = value.mul_(up) if want_h else None
        if into is None:
            return dgate, dup, h
        return into[0].copy_(dgate), into[1].copy_(dup), h
    dgate, dup = (torch.empty_like(dh), dh) if into is None else into
    h = torch.empty_like(dh) if want_h else None
    rows, cols = gate.shape
    gated_activation_backward_kernel(
        lambda blocks: (rows, cdiv(cols, blocks["BLOCK"])),
        gate, up, dgate, dup, gate.stride(0), dh, h, cols, activation,
    )  # fmt: skip
    return dgate, dup, h
