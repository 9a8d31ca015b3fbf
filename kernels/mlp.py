"""Linear plus activation of an MLP for few rows, and the pass between the GEMMs of its backward.

A program of the backward takes BLOCK_COLS columns and ROWS_PER_PROGRAM rows in tiles of BLOCK_ROWS,
and its share of the bias gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._activation import value_and_slope
from ._launcher import Config, kernel, precision, runs_triton
from ._sizes import cdiv
from ._sum_shares import new_shares, store_share, sum_shares
from ._triton import tl, triton

ROWS_PER_PROGRAM = 128


@kernel(Config({"BLOCK_ROWS": 16, "BLOCK_COLS": 128}, num_warps=4))
@triton.jit(do_not_specialize=["rows", "tokens", "period"])
def mlp_activation_backward_kernel(
    z_ptr,  # (images * period - gap, cols): `tokens` rows per image, then a gap
    dh_ptr,  # (rows, cols)
    dz_ptr,  # (rows, cols), may be dh
    h_ptr,  # (rows, cols) or None
    dbias_ptr, shares_ptr, shares_row,  # (cols,) or None; (cdiv(rows, ROWS), cols) fp32 or None
    rows, cols, tokens, period,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside_cols = col < cols
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.float32)
    for start in range(0, ROWS, BLOCK_ROWS):
        row = chunk * ROWS + start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & inside_cols[None, :]
        z_row = row + row // tokens * (period - tokens)
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
        share = tl.sum(dbias, axis=0)
        store_share(dbias_ptr, shares_ptr, chunk * shares_row, share, col, inside_cols)


FEW_ROWS = 512  # 16 images of 32 queries; up to here a saved launch outweighs cuBLAS's better tiles


@kernel(Config({"BLOCK_ROWS": 32, "BLOCK_COLS": 64, "BLOCK_INNER": 64}, num_warps=4, num_stages=3))
@triton.jit(do_not_specialize=["rows"])
def linear_activation_kernel(
    x_ptr, x_row,  # (rows, inner) with this row stride
    weight_ptr,  # (cols, inner)
    bias_ptr,  # (cols,) or None
    out_ptr,  # (rows, cols)
    rows, inner, cols,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    # Consecutive programs share columns, so they read their weights from L2.
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    program = tl.program_id(0)
    row = (program % row_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = (program // row_blocks).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside_rows, inside_cols = row < rows, col < cols
    z = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.float32)
    for start in range(0, inner, BLOCK_INNER):
        i = start + tl.arange(0, BLOCK_INNER)
        inside = i < inner
        x = tl.load(
            x_ptr + row[:, None] * x_row + i[None, :],
            mask=inside_rows[:, None] & inside[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + col[None, :] * inner + i[:, None],
            mask=inside[:, None] & inside_cols[None, :],
            other=0.0,
        )
        z = tl.dot(x, weight, z, input_precision=PRECISION)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + col, mask=inside_cols, other=0.0).to(tl.float32)[None, :]
    # Rounded, as a separate linear stores it.
    z = z.to(out_ptr.dtype.element_ty).to(tl.float32)
    h, _ = value_and_slope(z, ACTIVATION)
    inside = inside_rows[:, None] & inside_cols[None, :]
    tl.store(
        out_ptr + row[:, None] * cols + col[None, :], h.to(out_ptr.dtype.element_ty), mask=inside
    )


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Return ``activate(F.linear(x, weight, bias))``, ``(rows, cols)``, from one Triton launch.

    x: ``(rows, inner)``, inner stride 1. For few rows and calls without gradients, because the
    pre-activation is not stored.
    """
    rows, inner = x.shape
    cols = weight.shape[0]
    out = x.new_empty(rows, cols)

    def grid(blocks: dict[str, int]) -> tuple[int, ...]:
        return (cdiv(rows, blocks["BLOCK_ROWS"]) * cdiv(cols, blocks["BLOCK_COLS"]),)

    linear_activation_kernel(
        grid, x, x.stride(0), weight.contiguous(),
        bias if bias is None else bias.contiguous(), out,
        rows, inner, cols, activation, precision(),
    )  # fmt: skip
    return out


def mlp_activation_backward(
    z: Tensor,
    dh: Tensor,
    tokens: int,
    period: int,
    activation: str,
    *,
    want_h: bool,
    want_dbias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return dz (written over dh) and, if wanted, h and the bias gradient ``(cols,)``.

    z: ``(images * period - gap, cols)`` in any shape; dh: ``(images * tokens, cols)``; contiguous.
    """
    if not runs_triton(dh):
        return _aten(z, dh, tokens, period, activation, want_h, want_dbias)
    rows, cols = dh.shape
    h = torch.empty_like(dh) if want_h else None
    dbias = dh.new_empty(cols) if want_dbias else None
    chunks = max(-(-rows // ROWS_PER_PROGRAM), 1)
    shares, shares_row = new_shares(chunks, dbias)
    mlp_activation_backward_kernel(
        lambda blocks: (chunks, cdiv(cols, blocks["BLOCK_COLS"])),
        z, dh, dh, h, dbias, shares, shares_row,
        rows, cols, tokens, period, activation, ROWS_PER_PROGRAM,
    )  # fmt: skip
    sum_shares(shares, dbias)
    return dh, h, dbias


def _aten(
    z: Tensor, dh: Tensor, tokens: int, period: int, activation: str, want_h: bool, want_dbias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`mlp_activation_backward` from ATen's kernels, for CPUs."""
    if tokens == period:
        z = z if z.ndim == 2 else z.view(*dh.shape)
        dz = activation_backward(dh, z, activation)
    else:
        cols = dh.shape[1]
        z = z.as_strided((dh.shape[0] // tokens, tokens, cols), (period * cols, cols, 1))
        dz = activation_backward(dh.view(*z.shape), z, activation).view(*dh.shape)
    h = activate(z, activation) if want_h else None
    return dz, h, dz.sum(0) if want_dbias else None


def activate(z: Tensor, activation: str, *, overwrite: bool = False) -> Tensor:
    """Apply an activation with ATen, which is as fast as Triton for one elementwise pass.

    ``overwrite`` allows the result to be written over z.
    """
    return (_ATEN_IN_PLACE if overwrite else _ATEN)[activation](z)


_aten_ops = torch.ops.aten
_ATEN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": F.silu,
    "relu": F.relu,
}


# An overload of torch.ops takes the host twice as long.
_gelu_in_place: Callable[..., Tensor] = torch._C._nn.gelu_  # type: ignore[attr-defined]
_ATEN_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    **_ATEN,
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
