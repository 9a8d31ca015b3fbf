"""``LayerNorm(dropout(x + x_bias) + residual)``, one pass over memory in each direction.

A program holds whole rows. The forward saves z, the sum before the norm, and its statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _add_layer_norm_aten as aten
from ._add_layer_norm_backward import add_layer_norm_backward_kernel
from ._dropout import keep_tile, threshold
from ._launcher import Config, kernel, runs_triton
from ._sizes import next_power_of_2
from ._sum_shares import new_shares, split_rows, sum_shares
from ._triton import tl, triton


# Measured on an H200: for 32 rows the second config takes 4.9 us and the first 5.3; for 2,048 rows
# it takes 9.8 and the first 8.3.
@kernel(
    Config({"ELEMENTS": 2048}, num_warps=8),
    Config({"ELEMENTS": 1024}, num_warps=8),
    choose=lambda rows: int(rows <= 256),
)
@triton.jit(do_not_specialize=["rows", "tokens"])
def add_layer_norm_kernel(
    x_ptr, x_batch, x_token,  # (batch, tokens, cols) at these strides, inner 1
    residual_ptr, residual_batch, residual_token,
    x_bias_ptr, weight_ptr, bias_ptr,  # (cols,); x_bias may be None
    seed_ptr, drop_below, survivor_scale,
    y_ptr,  # (rows, cols)
    z_ptr, mean_ptr, rstd_ptr,  # (rows, cols), (rows,), (rows,), or None
    rows, tokens, cols, eps,
    BLOCK_COLS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = ELEMENTS // BLOCK_COLS if ELEMENTS > BLOCK_COLS else 1
    first = (tl.program_id(0).to(tl.int64) * ROWS).to(
        tl.int32
    )  # int32 holds row numbers, not offsets
    row = first + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_COLS)
    inside_cols = col < cols
    inside = (row < rows)[:, None] & inside_cols[None, :]
    batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    x_row = x_ptr + batch * x_batch + token * x_token
    residual_row = residual_ptr + batch * residual_batch + token * residual_token
    z = tl.load(x_row[:, None] + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if x_bias_ptr is not None:
        z += tl.load(x_bias_ptr + col, mask=inside_cols, other=0.0).to(tl.float32)[None, :]
    if seed_ptr is not None:
        z *= survivor_scale * keep_tile(
            tl.load(seed_ptr), col[None, :], row[:, None], 0, drop_below
        )
    z += tl.load(residual_row[:, None] + col[None, :], mask=inside, other=0.0).to(tl.float32)
    z = z.to(y_ptr.dtype.element_ty).to(tl.float32)  # the rounded sum, which backward reads
    mean = tl.sum(tl.where(inside, z, 0.0), axis=1) / cols
    # If the mean is far larger than the deviation, its rounding error matters: subtract the
    # mean of what remains too.
    rest = tl.sum(tl.where(inside, z - mean[:, None], 0.0), axis=1) / cols
    centered = tl.where(inside, z - mean[:, None] - rest[:, None], 0.0)
    mean += rest
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / cols + eps)
    weight = tl.load(weight_ptr + col, mask=inside_cols, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=inside_cols, other=0.0).to(tl.float32)
    y = centered * rstd[:, None] * weight[None, :] + bias[None, :]
    offset = row.to(tl.int64)[:, None] * cols + col[None, :]
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)
    if z_ptr is not None:
        tl.store(z_ptr + offset, z.to(z_ptr.dtype.element_ty), mask=inside)
        tl.store(mean_ptr + row, mean, mask=row < rows)
        tl.store(rstd_ptr + row, rstd, mask=row < rows)


Statistics = tuple[Tensor, ...]  # z (rows, cols), mean (rows,), rstd (rows,); or ()


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None,
    seed: Tensor | None, *, eps: float, dropout: float, want_statistics: bool,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    """Return y, contiguous and like the residual, and the statistics for backward.

    x, residual: ``(batch, tokens, cols)``, or both ``(tokens, cols)``, inner stride 1; parameters:
    ``(cols,)``, contiguous. ``seed`` is None without dropout.
    """
    if not runs_triton(residual):
        y, statistics = aten.forward(x, residual, weight, bias, x_bias, seed, eps, dropout)
        return y, statistics if want_statistics else ()
    *images, tokens, cols = residual.shape
    rows = tokens * images[0] if images else tokens
    strides = x.stride()[:2] + residual.stride()[:2]
    if not images:
        strides = (0, x.stride(0), 0, residual.stride(0))
    y = residual.new_empty(*residual.shape)
    statistics = ()
    if want_statistics:
        z, mean = residual.new_empty(rows, cols), residual.new_empty(rows, dtype=torch.float32)
        statistics = z, mean, torch.empty_like(mean)
    block = next_power_of_2(cols)
    add_layer_norm_kernel(
        lambda blocks: (-(-rows // max(blocks["ELEMENTS"] // block, 1)),),
        x, *strides[:2], residual, *strides[2:], x_bias, weight, bias,
        seed, threshold(dropout), 1 / (1 - dropout), y, *(statistics or (None, None, None)),
        rows, tokens, cols, eps, block, size=rows,
    )  # fmt: skip
    return y, statistics


def add_layer_norm_backward(
    dy: Tensor, statistics: Statistics, weight: Tensor, seed: Tensor | None,
    *, dropout: float, x_dtype: torch.dtype, x_bias_dtype: torch.dtype | None,
    want_x: bool, want_residual: bool, want_weight: bool, want_bias: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients ``(rows, cols)`` of x and residual, and ``(cols,)`` of weight, bias and x_bias.

    dy: ``(rows, cols)``, contiguous. The bias has the dtype of the weight; no dtype of x_bias means
    that its gradient is not wanted. Without dropout x and the residual have the same gradient; it
    is returned as one tensor if their dtypes are equal.
    """
    if not runs_triton(dy):
        of_x, of_residual, *of_norm = aten.backward(
            dy, statistics, weight, seed, dropout, want_weight, want_bias
        )
        of_x_bias = None if x_bias_dtype is None else of_x.sum(0)
        return of_x if want_x else None, of_residual if want_residual else None, *of_norm, of_x_bias
    z, mean, rstd = statistics
    rows, cols = dy.shape
    shared = seed is None and x_dtype == z.dtype
    dz = torch.empty_like(z) if want_residual or (shared and want_x) else None
    dx = torch.empty_like(z, dtype=x_dtype) if want_x and not shared else None
    wide = cols > 4096
    rows_per_program, programs = split_rows(rows, 4, wide)
    parameters = (
        weight.new_empty(cols) if want_weight else None,
        weight.new_empty(cols) if want_bias else None,
        None if x_bias_dtype is None else weight.new_empty(cols, dtype=x_bias_dtype),
    )
    shares, shares_row = new_shares(programs, *parameters)
    add_layer_norm_backward_kernel(
        lambda blocks: (programs,),
        dy, z, mean, rstd, weight, seed, threshold(dropout), 1 / (1 - dropout), dz, dx,
        *parameters, shares, shares_row, rows, rows_per_program, cols, next_power_of_2(cols),
        size=wide or programs == 1,
    )  # fmt: skip
    sum_shares(shares, *parameters)
    dx = dz if shared and want_x else dx
    return dx, dz if want_residual else None, *parameters
