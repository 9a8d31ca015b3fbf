"""``x + tanh(gate) y`` and the norm that follows, one pass over memory in each direction.

A program holds whole rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _gated_add_aten as aten
from ._gated_add_aten import Statistics
from ._gated_add_backward import gated_add_backward_kernel
from ._launcher import Config, in_rows, kernel, runs_triton
from ._sizes import cdiv, next_power_of_2
from ._sum_shares import new_shares, split_rows, sum_shares
from ._tanh_gate import load_gate, load_masked_rows
from ._triton import tl, triton


@kernel(Config({"ELEMENTS": 2048}, num_warps=8))
@triton.jit(do_not_specialize=["rows", "tokens"])
def gated_add_kernel(
    x_ptr, x_batch, x_token,  # (batch, tokens, cols) at these strides, inner 1
    y_ptr, y_batch, y_token,
    gate_ptr,  # (1,) or (cols,)
    kept_ptr,  # (rows,) bytes, or None
    weight_ptr, bias_ptr,  # (cols,) or None: of the norm
    h_ptr, normed_ptr,  # (rows, cols)
    mean_ptr, rstd_ptr,  # (rows,) or None
    rows, tokens, cols, eps,
    PER_FEATURE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_COLS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = ELEMENTS // BLOCK_COLS if ELEMENTS > BLOCK_COLS else 1
    first = (tl.program_id(0).to(tl.int64) * ROWS).to(
        tl.int32
    )  # int32 holds row numbers, not offsets
    row = first + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_COLS)
    inside_rows, inside_cols = row < rows, col < cols
    inside = inside_rows[:, None] & inside_cols[None, :]
    batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    at = x_ptr + (batch * x_batch + token * x_token)[:, None] + col[None, :]
    h = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    y, kept = load_masked_rows(
        y_ptr, row, inside_rows, col, inside_cols, y_batch, y_token, tokens, kept_ptr
    )
    gated = load_gate(gate_ptr, col, inside_cols, PER_FEATURE)[None, :] * y
    h += tl.where(kept[:, None], gated, 0.0)
    offset = row.to(tl.int64)[:, None] * cols + col[None, :]
    tl.store(h_ptr + offset, h.to(h_ptr.dtype.element_ty), mask=inside)
    if NORM != "none":
        h = h.to(h_ptr.dtype.element_ty).to(tl.float32)  # the rounded sum, which backward reads
        centered = tl.where(inside, h, 0.0)
        if NORM == "layer":
            mean = tl.sum(centered, axis=1) / cols
            # If the mean is far larger than the deviation, its rounding error matters: subtract
            # the mean of what remains too.
            rest = tl.sum(tl.where(inside, h - mean[:, None], 0.0), axis=1) / cols
            centered = tl.where(inside, h - mean[:, None] - rest[:, None], 0.0)
            if mean_ptr is not None:
                tl.store(mean_ptr + row, mean + rest, mask=inside_rows)
        rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / cols + eps)
        if rstd_ptr is not None:
            tl.store(rstd_ptr + row, rstd, mask=inside_rows)
        weight = tl.load(weight_ptr + col, mask=inside_cols, other=0.0).to(tl.float32)
        normed = centered * rstd[:, None]
        if NORM == "rms":  # rounded before the weight, as Llama does
            normed = normed.to(normed_ptr.dtype.element_ty).to(tl.float32)
        normed *= weight[None, :]
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + col, mask=inside_cols, other=0.0).to(tl.float32)
            normed += bias[None, :]
        tl.store(normed_ptr + offset, normed.to(normed_ptr.dtype.element_ty), mask=inside)


def gated_add(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    row_mask: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 0.0,
    norm: str = "none",
) -> tuple[Tensor, Tensor | None, Statistics]:
    """Return h, its norm or None, and the norm's statistics; h and the norm are like x, contiguous.

    x, y: ``(..., cols)``; gate: contiguous, of one or ``cols`` elements; row_mask: bool
    ``x.shape[:-1]``; weight, bias: ``(cols,)``, contiguous.
    """
    if not runs_triton(x):
        return aten.forward(x, y, gate, row_mask, weight, bias, eps, norm)
    h = x.new_empty(*x.shape)  # not a view: users may write to it
    x, y = in_rows(x), in_rows(y)
    batch, tokens, cols = x.shape
    rows = batch * tokens
    normed = None if norm == "none" else torch.empty_like(h)
    rstd = None if norm == "none" else x.new_empty(rows, dtype=torch.float32)
    mean = torch.empty_like(rstd) if norm == "layer" and rstd is not None else None
    block = next_power_of_2(cols)
    gated_add_kernel(
        lambda blocks: (cdiv(rows, max(blocks["ELEMENTS"] // block, 1)),),
        x, *x.stride()[:2], y, *y.stride()[:2], gate, _bytes(row_mask), weight, bias,
        h, normed, mean, rstd, rows, tokens, cols, eps, gate.numel() > 1, norm, block,
    )  # fmt: skip
    return h, normed, (mean, rstd)


def gated_add_backward(
    dh: Tensor,
    dnormed: Tensor | None,
    h: Tensor | None,
    statistics: Statistics,
    y: Tensor | None,
    gate: Tensor,
    row_mask: Tensor | None,
    weight: Tensor | None,
    *,
    norm: str,
    want_x: bool,
    want_y: bool,
    want_gate: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Any, ...]:
    """Gradients of x and y like dh, and of gate, weight and bias like these; None if not wanted.

    dh, dnormed, h: ``(..., cols)``; y as in the forward, needed for the gradient of the gate.
    """
    if not runs_triton(dh):
        return aten.backward(
            dh, dnormed, h, statistics, y, gate, row_mask, weight, norm,
            want_x, want_y, want_gate, want_weight, want_bias,
        )  # fmt: skip
    plain = norm == "none"  # then dx is dh
    dh = dh.contiguous()
    dnormed = None if dnormed is None else dnormed.contiguous()
    y = None if y is None else in_rows(y)
    batch, tokens, cols = in_rows(dh).shape
    rows = batch * tokens
    dx = torch.empty_like(dh) if want_x and not plain else None
    dy = torch.empty_like(dh) if want_y else None
    dgate = torch.empty_like(gate) if want_gate else None
    dweight = torch.empty_like(weight) if want_weight and weight is not None else None
    dbias = torch.empty_like(weight) if want_bias and weight is not None else None
    wide = not plain and cols > 2048
    rows_per_program, programs = split_rows(rows, 4, wide)
    shares, shares_row = new_shares(programs, dweight, dbias, dgate)
    gated_add_backward_kernel(
        lambda blocks: (programs,),
        dh, dnormed, h, *statistics, weight,
        y if want_gate else None, *(y.stride()[:2] if want_gate and y is not None else (0, 0)),
        gate, _bytes(row_mask), dx, dy, dweight, dbias, dgate, shares, shares_row,
        rows, rows_per_program, tokens, cols, gate.numel() > 1, norm, next_power_of_2(cols),
        size=wide or programs == 1,
    )  # fmt: skip
    sum_shares(shares, dweight, dbias, dgate)
    return dh if plain and want_x else dx, dy, dgate, dweight, dbias


def _bytes(row_mask: Tensor | None) -> Tensor | None:
    return None if row_mask is None else row_mask.contiguous().view(torch.uint8)
