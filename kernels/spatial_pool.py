"""Average, max or bilinear pooling of tokens ``(batch, height * width, cols)``; no NCHW copy.

A program holds a tile of tokens by channels. The backward gathers: each token of the input sums the
gradients of the pooled tokens it went into, in a fixed order and without atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _spatial_pool_aten as aten
from ._launcher import Config, kernel, runs_triton
from ._pooling import Pooling
from ._sizes import cdiv
from ._triton import tl, triton

LARGEST = tl.constexpr(2**15 - 1)  # of two such numbers the product fits in int32, twice


@triton.jit
def _coordinate(x, WIDE: tl.constexpr):
    """A coordinate or a side in int64 if WIDE, else in int32 and bounded."""
    return tl.cast(x, tl.int64) if WIDE else tl.minimum(x, LARGEST)


@triton.jit
def _tap(at, tap, size, pooled, STRIDE: tl.constexpr, BILINEAR: tl.constexpr):
    """The ``tap``-th input coordinate of the pooled coordinate ``at``, and its weight."""
    if BILINEAR:  # integers, so that weights are exact except for one division
        halves = (2 * at + 1) * size - pooled
        first = halves // (2 * pooled)
        share = (halves % (2 * pooled)).to(tl.float32) / (2.0 * pooled)
        return tl.minimum(first + tap, size - 1), tl.where(tap == 1, share, 1.0 - share)
    else:
        return at * STRIDE + tap, tl.full(at.shape, 1.0, tl.float32)


@triton.jit
def _pooled_coordinate(
    source, near, size, pooled, STRIDE: tl.constexpr, BILINEAR: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The ``near``-th pooled coordinate that ``source`` may be a tap of, and its weight."""
    if BILINEAR:
        at = _coordinate(((2 * source - 1) * pooled + size) // (2 * size) + near, WIDE)
        first, weight = _tap(at, 0, size, pooled, STRIDE, BILINEAR)
        second, other = _tap(at, 1, size, pooled, STRIDE, BILINEAR)
        weight = tl.where(first == source, weight, 0.0) + tl.where(second == source, other, 0.0)
        return at, tl.where(at < pooled, weight, 0.0)
    else:
        at = source // STRIDE
        return at, tl.where(at < pooled, 1.0, 0.0)


@kernel(Config({"TOKENS": 8, "COLS": 256}, num_warps=8))
@triton.jit(do_not_specialize=["rows"])
def spatial_pool_kernel(
    x_ptr, x_batch, x_token,  # (batch, height * width, cols) at these strides, inner 1
    pooled_ptr,  # (rows, cols), rows of all images
    chosen_ptr,  # (rows, cols) bytes: the number of the largest tap; or None
    rows, height, width, pooled_height, pooled_width, cols,
    MODE: tl.constexpr, STRIDE: tl.constexpr, WIDE: tl.constexpr,
    TOKENS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    BILINEAR: tl.constexpr = MODE == "bilinear"
    TAPS: tl.constexpr = 2 if BILINEAR else STRIDE
    height, width = _coordinate(height, WIDE), _coordinate(width, WIDE)
    pooled_height = _coordinate(pooled_height, WIDE)
    pooled_width = _coordinate(pooled_width, WIDE)
    first = (tl.program_id(0).to(tl.int64) * TOKENS).to(tl.int32)  # int32 holds tokens, not offsets
    row = first + tl.arange(0, TOKENS)
    line = row // pooled_width
    image = (line // pooled_height).to(tl.int64)
    y, x = line % pooled_height, row % pooled_width
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        total = tl.full([TOKENS, COLS], float("-inf") if MODE == "max" else 0.0, tl.float32)
        chosen = tl.zeros([TOKENS, COLS], tl.int32)
        for tap_y in range(TAPS):  # not unrolled, which saves registers
            from_y, weight_y = _tap(y, tap_y, height, pooled_height, STRIDE, BILINEAR)
            line_ptr = x_ptr + image * x_batch + from_y.to(tl.int64) * width * x_token
            for tap_x in tl.static_range(TAPS):
                from_x, weight_x = _tap(x, tap_x, width, pooled_width, STRIDE, BILINEAR)
                at = (line_ptr + from_x.to(tl.int64) * x_token)[:, None] + col[None, :]
                value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                if MODE == "max":  # NaN is the largest; the last of several NaN is taken
                    larger = (value > total) | (value != value)
                    total = tl.where(larger, value, total)
                    chosen = tl.where(larger, tap_y * TAPS + tap_x, chosen)
                else:
                    total += (weight_y * weight_x)[:, None] * value
        if MODE == "avg":
            total /= STRIDE * STRIDE
        to = row.to(tl.int64)[:, None] * cols + col[None, :]
        tl.store(pooled_ptr + to, total.to(pooled_ptr.dtype.element_ty), mask=inside)
        if chosen_ptr is not None:
            tl.store(chosen_ptr + to, chosen.to(tl.uint8), mask=inside)


@kernel(Config({"TOKENS": 8, "COLS": 256}, num_warps=8))
@triton.jit(do_not_specialize=["rows"])
def spatial_pool_backward_kernel(
    dpooled_ptr,  # (batch, pooled tokens, cols), dense
    chosen_ptr,  # written by the forward, or None
    dx_ptr,  # (rows, cols), rows of all images
    rows, height, width, pooled_height, pooled_width, cols,
    MODE: tl.constexpr, STRIDE: tl.constexpr, WIDE: tl.constexpr,
    TOKENS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    height, width = _coordinate(height, WIDE), _coordinate(width, WIDE)
    pooled_height = _coordinate(pooled_height, WIDE)
    pooled_width = _coordinate(pooled_width, WIDE)
    first = (tl.program_id(0).to(tl.int64) * TOKENS).to(tl.int32)
    row = first + tl.arange(0, TOKENS)
    tap = row // width % height % STRIDE * STRIDE + row % width % STRIDE
    sizes = (height, width, pooled_height, pooled_width)
    at, weight = _pooled_token(row, 0, 0, sizes, MODE, STRIDE, WIDE)
    if MODE == "bilinear":  # a coordinate has two neighbours
        at_01, weight_01 = _pooled_token(row, 0, 1, sizes, MODE, STRIDE, WIDE)
        at_10, weight_10 = _pooled_token(row, 1, 0, sizes, MODE, STRIDE, WIDE)
        at_11, weight_11 = _pooled_token(row, 1, 1, sizes, MODE, STRIDE, WIDE)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        total = _weighted(dpooled_ptr, at, weight, col, cols, inside)
        if MODE == "max":
            here = inside & (weight > 0)[:, None]
            chosen = tl.load(
                chosen_ptr + at[:, None] * cols + col[None, :], mask=here, other=255
            ).to(tl.int32)  # fmt: skip
            total = tl.where(chosen == tap[:, None], total, 0.0)
        elif MODE == "bilinear":
            total += _weighted(dpooled_ptr, at_01, weight_01, col, cols, inside)
            total += _weighted(dpooled_ptr, at_10, weight_10, col, cols, inside)
            total += _weighted(dpooled_ptr, at_11, weight_11, col, cols, inside)
        else:
            total /= STRIDE * STRIDE
        to = row.to(tl.int64)[:, None] * cols + col[None, :]
        tl.store(dx_ptr + to, total.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _pooled_token(
    row, near_y: tl.constexpr, near_x: tl.constexpr, sizes,
    MODE: tl.constexpr, STRIDE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A pooled token, among those of all images, that a token may go into, and its weight."""
    height, width, pooled_height, pooled_width = sizes
    BILINEAR: tl.constexpr = MODE == "bilinear"
    line = row // width
    to_y, weight_y = _pooled_coordinate(
        line % height, near_y, height, pooled_height, STRIDE, BILINEAR, WIDE
    )
    to_x, weight_x = _pooled_coordinate(
        row % width, near_x, width, pooled_width, STRIDE, BILINEAR, WIDE
    )
    image = (line // height).to(tl.int64)
    return (image * pooled_height + to_y) * pooled_width + to_x, weight_y * weight_x


@triton.jit
def _weighted(ptr, row, weight, col, cols, inside):
    """A tile of rows times their weights; rows whose weight is 0 are not read."""
    at = row[:, None] * cols + col[None, :]
    x = tl.load(ptr + at, mask=inside & (weight > 0)[:, None], other=0.0).to(tl.float32)
    return x * weight[:, None]


def spatial_pool(x: Tensor, pooling: Pooling, want_chosen: bool) -> tuple[Tensor, Tensor | None]:
    """Pool ``(batch, tokens, cols)`` into ``(batch, pooled tokens, cols)``.

    x: inner stride 1. The second result tells the backward which taps were the maxima; its format
    is private and differs between devices. Modes other than "max" have None.
    """
    if not runs_triton(x):
        return aten.forward(x, pooling)
    batch, _, cols = x.shape
    height, width = pooling.pooled
    rows = batch * height * width
    pooled = x.new_empty(batch, height * width, cols)
    chosen = torch.empty_like(pooled, dtype=torch.uint8) if want_chosen else None
    spatial_pool_kernel(
        lambda blocks: (cdiv(rows, blocks["TOKENS"]),),
        x, *x.stride()[:2], pooled, chosen, rows, pooling.height, pooling.width, height, width,
        cols, pooling.mode, pooling.stride, pooling.wide,
    )  # fmt: skip
    return pooled, chosen


def spatial_pool_backward(dpooled: Tensor, chosen: Tensor | None, pooling: Pooling) -> Tensor:
    """The gradient ``(batch, tokens, cols)``, from ``(batch, pooled tokens, cols)``; both dense."""
    if not runs_triton(dpooled):
        return aten.backward(dpooled, chosen, pooling)
    batch, _, cols = dpooled.shape
    tokens = pooling.height * pooling.width
    dx = dpooled.new_empty(batch, tokens, cols)
    rows = batch * tokens
    spatial_pool_backward_kernel(
        lambda blocks: (cdiv(rows, blocks["TOKENS"]),),
        dpooled, chosen, dx, rows, pooling.height, pooling.width, *pooling.pooled, cols,
        pooling.mode, pooling.stride, pooling.wide,
    )  # fmt: skip
    return dx
