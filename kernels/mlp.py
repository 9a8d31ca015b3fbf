"""Activations of an MLP, and the pass between the GEMMs of its backward.

A program of the backward takes BLOCK_COLS columns and ROWS_PER_PROGRAM rows in tiles of BLOCK_ROWS,
and its share of the bias gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._activation import value_and_slope
from ._launcher import Config, kernel, runs_triton
from ._pipeline import stages
from ._sizes import cdiv
from ._sum_shares import new_shares, store_share, sum_shares
from ._triton import tl, triton

ROWS_PER_PROGRAM = 128


@kernel(Config({"BLOCK_ROWS": 16, "BLOCK_COLS": 128}, num_warps=4))
@triton.jit(do_not_specialize=["rows", "tokens", "period", "out_at"])
def mlp_activation_backward_kernel(
    z_ptr,  # (images * period - gap, cols): `tokens` rows per image, then a gap; period may be None
    dh_ptr,  # (rows, cols)
    dz_ptr,  # (rows, cols), may be dh
    h_ptr,  # (rows, cols), may be z without gaps; or None
    dbias_ptr,  # (cols,) or None
    dy_ptr, dy_row, dy_col, dbias_2_ptr,  # (rows, out) at these strides, (out,); or None
    shares_ptr, shares_row,  # (cdiv(rows, ROWS), ...) fp32: of dbias, at out_at of dbias_2; or None
    rows, cols, tokens, period, out, out_at,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    shares_at = tl.program_id(0).to(tl.int64) * shares_row
    block, blocks = tl.program_id(1), tl.cdiv(cols, BLOCK_COLS)
    if dbias_2_ptr is None or block < blocks:
        _activation_backward(
            z_ptr, dh_ptr, dz_ptr, h_ptr, dbias_ptr, shares_ptr, shares_at, first, block,
            rows, cols, tokens, period, ACTIVATION, ROWS, BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip
    else:
        col = (block - blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.float32)
        for start in tl.range(0, tl.minimum(rows - first, ROWS), BLOCK_ROWS, num_stages=3):
            row = first + start + tl.arange(0, BLOCK_ROWS)
            inside = (row < rows)[:, None] & (col < out)[None, :]
            at = dy_ptr + row[:, None] * dy_row + col[None, :] * dy_col
            total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        share = tl.sum(total, axis=0)
        store_share(dbias_2_ptr, shares_ptr, shares_at + out_at, share, col, col < out)


@triton.jit
def _activation_backward(
    z_ptr, dh_ptr, dz_ptr, h_ptr, dbias_ptr, shares_ptr, shares_at, first, block,
    rows, cols, tokens, period,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """A program's rows and columns of dz and h, and its share of the bias gradient."""
    BITS: tl.constexpr = dh_ptr.dtype.element_ty.primitive_bitwidth
    STAGES: tl.constexpr = stages(BITS, 2 * BLOCK_ROWS * BLOCK_COLS, 8 * BLOCK_ROWS * BLOCK_COLS)
    col = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside_cols = col < cols
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.float32)
    for start in tl.range(0, tl.minimum(rows - first, ROWS), BLOCK_ROWS, num_stages=STAGES):
        row = first + start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & inside_cols[None, :]
        z_row = row
        if period is not None:
            z_row += (row.to(tl.int32) // tokens).to(tl.int64) * (period - tokens)
        offset = row[:, None] * cols + col[None, :]
        z = tl.load(z_ptr + z_row[:, None] * cols + col[None, :], mask=inside, other=0.0)
        dh = tl.load(dh_ptr + offset, mask=inside, other=0.0)
        h, slope = value_and_slope(z.to(tl.float32), ACTIVATION)
        dz = dh.to(tl.float32) * slope
        tl.store(dz_ptr + offset, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        if h_ptr is not None:
            tl.store(h_ptr + offset, h.to(h_ptr.dtype.element_ty), mask=inside)
        if dbias_ptr is not None:
            dbias += tl.where(inside, dz, 0.0)
    if dbias_ptr is not None:
        store_share(dbias_ptr, shares_ptr, shares_at, tl.sum(dbias, axis=0), col, inside_cols)


def mlp_activation_backward(
    z: Tensor,
    dh: Tensor,
    dy: Tensor,
    tokens: int,
    period: int,
    activation: str,
    *,
    want_h: bool,
    want_dbias: bool,
    want_dbias_2: bool,
    overwrite_z: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return dz (written over dh) and, if wanted, h and the gradients of both biases.

    z: ``(images * period - gap, cols)`` in any shape; dh: ``(images * tokens, cols)``; contiguous.
    dy: ``(images * tokens, out)``. ``overwrite_z`` allows h to be written over z, which is done if
    there are no gaps between images.
    """
    if not runs_triton(dh):
        overwrite_z = overwrite_z and tokens == period
        dz, h, dbias = _aten(z, dh, tokens, period, activation, want_h, want_dbias, overwrite_z)
        return dz, h, dbias, dy.sum(0) if want_dbias_2 else None
    rows, cols = dh.shape
    out = dy.shape[1]
    h = None
    if want_h:
        h = z.view(rows, cols) if overwrite_z and tokens == period else torch.empty_like(dh)
    dbias = dh.new_empty(cols) if want_dbias else None
    dbias_2 = dh.new_empty(out) if want_dbias_2 else None
    chunks = max(-(-rows // ROWS_PER_PROGRAM), 1)
    shares, shares_row = new_shares(chunks, dbias, dbias_2)

    def grid(blocks: dict[str, int]) -> tuple[int, ...]:
        width = blocks["BLOCK_COLS"]
        return chunks, cdiv(cols, width) + (cdiv(out, width) if want_dbias_2 else 0)

    mlp_activation_backward_kernel(
        grid, z, dh, dh, h, dbias, dy if want_dbias_2 else None, *dy.stride(), dbias_2,
        shares, shares_row, rows, cols, tokens, None if tokens == period else period,
        out, cols if want_dbias else 0,
        activation, ROWS_PER_PROGRAM,
    )  # fmt: skip
    sum_shares(shares, dbias, dbias_2)
    return dh, h, dbias, dbias_2


def _aten(
    z: Tensor, dh: Tensor, tokens: int, period: int, activation: str, want_h: bool,
    want_dbias: bool, overwrite_z: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """`mlp_activation_backward` of z and the first bias from ATen's kernels, for CPUs."""
    if tokens == period:
        z = z if z.ndim == 2 else z.view(*dh.shape)
        dz = activation_backward(dh, z, activation)
    else:
        cols = dh.shape[1]
        z = z.as_strided((dh.shape[0] // tokens, tokens, cols), (period * cols, cols, 1))
        dz = activation_backward(dh.view(*z.shape), z, activation).view(*dh.shape)
    h = activate(z, activation, overwrite=overwrite_z) if want_h else None
    return dz, h, dz.sum(0) if want_dbias else None


def activate(z: Tensor, activation: str, *, overwrite: bool = False) -> Tensor:
    """Apply an activation with ATen, which is as fast as Triton for one elementwise pass.

    ``overwrite`` allows the result to be written over z.
    """
    return (ATEN_IN_PLACE if overwrite else ATEN)[activation](z)


_aten_ops = torch.ops.aten
ATEN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": F.silu,
    "relu": F.relu,
}


# An overload of torch.ops takes the host twice as long.
_gelu_in_place: Callable[..., Tensor] = torch._C._nn.gelu_  # type: ignore[attr-defined]
ATEN_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    **ATEN,
    "gelu": _gelu_in_place,
    "gelu_tanh": lambda z: _gelu_in_place(z, approximate="tanh"),
    "silu": lambda z: F.silu(z, inplace=True),
    "relu": lambda z: F.relu(z, inplace=True),
}


def activation_backward(dh: Tensor, z: Tensor, activation: str) -> Tensor:
    """The gradient of z from ATen's kernels. May be written over dh."""
    return _ATEN_BACKWARD[activation](dh, z)


def _quick_gelu_backward(dh: Tensor, z: Tensor) -> Tensor:
    wide = z.float()
    gate = torch.sigmoid(1.702 * wide)
    return (dh.float() * (gate + 1.702 * wide * gate * (1 - gate))).to(dh.dtype)


# In place, because dh is a temporary of the caller.
_ATEN_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": lambda dh, z: _aten_ops.gelu_backward.grad_input(dh, z, grad_input=dh),
    "gelu_tanh": lambda dh, z: _aten_ops.gelu_backward.grad_input(
        dh, z, approximate="tanh", grad_input=dh
    ),
    "quick_gelu": _quick_gelu_backward,
    "silu": lambda dh, z: _aten_ops.silu_backward.grad_input(dh, z, grad_input=dh),
    "relu": lambda dh, z: _aten_ops.threshold_backward.grad_input(dh, z, 0, grad_input=dh),
}
