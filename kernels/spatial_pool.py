"""Pooling of a grid of tokens as the tower leaves them, ``(batch, tokens, cols)``: no NCHW copy.

A program holds a tile of tokens by channels. Backward gathers: each token of the input adds up what
the pooled tokens it went into give back, in one order and without atomics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._launcher import Config, is_traced, kernel, runs_triton
from ._triton import tl, triton


@dataclass(frozen=True)
class Pooling:
    """A grid and how it is pooled; ``mode`` is "avg", "max" or "bilinear"."""

    height: int
    width: int
    mode: str
    stride: int

    @property
    def pooled(self) -> tuple[int, int]:
        if self.mode == "bilinear":
            return -(-self.height // self.stride), -(-self.width // self.stride)
        return self.height // self.stride, self.width // self.stride


@triton.jit
def _tap(at, tap, size, pooled, STRIDE: tl.constexpr, BILINEAR: tl.constexpr):
    """The ``tap``-th coordinate that goes into the pooled one ``at``, and its weight."""
    if BILINEAR:  # in whole numbers: weights are exact but for one division
        halves = (2 * at + 1) * size - pooled
        first = halves // 2 // pooled  # `2 * pooled` might not fit where `pooled` does
        share = (halves - 2 * first * pooled).to(tl.float32) / (2.0 * pooled)
        return tl.minimum(first + tap, size - 1), tl.where(tap == 1, share, 1.0 - share)
    else:
        return at * STRIDE + tap, tl.full(at.shape, 1.0, tl.float32)


@triton.jit
def _near(source, near, size, pooled, STRIDE: tl.constexpr, BILINEAR: tl.constexpr):
    """The ``near``-th pooled coordinate that ``source`` may go into, and with which weight."""
    if BILINEAR:
        at = ((2 * source - 1) * pooled + size) // 2 // size + near
        first, weight = _tap(at, 0, size, pooled, STRIDE, BILINEAR)
        second, other = _tap(at, 1, size, pooled, STRIDE, BILINEAR)
        weight = tl.where(first == source, weight, 0.0) + tl.where(second == source, other, 0.0)
        return at, tl.where(at < pooled, weight, 0.0)
    else:
        at = source // STRIDE
        return at, tl.where(at < pooled, 1.0, 0.0)


@kernel(Config({"TOKENS": 2, "COLS": 1024}, num_warps=8))
@triton.jit(do_not_specialize=["rows"])
def spatial_pool_kernel(
    x_ptr, x_batch, x_token,  # (batch, height * width, cols) at these strides, inner 1
    pooled_ptr,  # (rows, cols), rows of all images
    chosen_ptr,  # (rows, cols) bytes, which tap was the largest, or None
    rows, height, width, pooled_height, pooled_width, cols,
    MODE: tl.constexpr, STRIDE: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    BILINEAR: tl.constexpr = MODE == "bilinear"
    TAPS: tl.constexpr = 2 if BILINEAR else STRIDE
    first = (tl.program_id(0).to(tl.int64) * TOKENS).to(tl.int32)  # tokens fit, offsets do not
    row = first + tl.arange(0, TOKENS)
    line = row // pooled_width
    image = (line // pooled_height).to(tl.int64)
    y, x = (line % pooled_height).to(tl.int64), (row % pooled_width).to(tl.int64)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        total = tl.full([TOKENS, COLS], float("-inf") if MODE == "max" else 0.0, tl.float32)
        chosen = tl.zeros([TOKENS, COLS], tl.int32)
        for tap_y in range(TAPS):  # not unrolled: a row of a window in registers is enough
            from_y, weight_y = _tap(y, tap_y, height, pooled_height, STRIDE, BILINEAR)
            line_ptr = x_ptr + image * x_batch + from_y * width * x_token
            for tap_x in tl.static_range(TAPS):
                from_x, weight_x = _tap(x, tap_x, width, pooled_width, STRIDE, BILINEAR)
                at = (line_ptr + from_x * x_token)[:, None] + col[None, :]
                value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                if MODE == "max":  # NaN is larger than anything, and of several the last is taken
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


@kernel(Config({"TOKENS": 2, "COLS": 1024}, num_warps=8))
@triton.jit(do_not_specialize=["rows"])
def spatial_pool_backward_kernel(
    dpooled_ptr,  # (batch, pooled tokens, cols), dense
    chosen_ptr,  # as the forward left it, or None
    dx_ptr,  # (rows, cols), rows of all images
    rows, height, width, pooled_height, pooled_width, cols,
    MODE: tl.constexpr, STRIDE: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    BILINEAR: tl.constexpr = MODE == "bilinear"
    NEAR: tl.constexpr = 2 if BILINEAR else 1  # pooled coordinates are a stride apart
    first = (tl.program_id(0).to(tl.int64) * TOKENS).to(tl.int32)
    row = first + tl.arange(0, TOKENS)
    line = row // width
    image = (line // height).to(tl.int64)
    y, x = (line % height).to(tl.int64), (row % width).to(tl.int64)
    tap = y % STRIDE * STRIDE + x % STRIDE
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        total = tl.zeros([TOKENS, COLS], tl.float32)
        for near in tl.static_range(NEAR * NEAR):
            to_y, weight_y = _near(y, near // NEAR, height, pooled_height, STRIDE, BILINEAR)
            to_x, weight_x = _near(x, near % NEAR, width, pooled_width, STRIDE, BILINEAR)
            pooled = (image * pooled_height + to_y) * pooled_width + to_x
            weight = weight_y * weight_x
            given = inside & (weight > 0)[:, None]
            at = pooled[:, None] * cols + col[None, :]
            dpooled = tl.load(dpooled_ptr + at, mask=given, other=0.0).to(tl.float32)
            if MODE == "max":
                chosen = tl.load(chosen_ptr + at, mask=given, other=255).to(tl.int32)
                total = tl.where(given & (chosen == tap[:, None]), dpooled, 0.0)
            else:
                total += tl.where(given, weight[:, None] * dpooled, 0.0)
        if MODE == "avg":
            total /= STRIDE * STRIDE
        to = row.to(tl.int64)[:, None] * cols + col[None, :]
        tl.store(dx_ptr + to, total.to(dx_ptr.dtype.element_ty), mask=inside)


def spatial_pool(x: Tensor, pooling: Pooling, want_chosen: bool) -> tuple[Tensor, Tensor | None]:
    """``(batch, pooled tokens, cols)`` of ``(batch, tokens, cols)``; and where maxima were.

    x: inner stride 1. The latter is for the backward alone, in a form of its own on each device.
    """
    if not runs_triton(x):
        return _aten(x, pooling)
    batch, _, cols = x.shape
    height, width = pooling.pooled
    rows = batch * height * width
    pooled = x.new_empty(batch, height * width, cols)
    chosen = torch.empty_like(pooled, dtype=torch.uint8) if want_chosen else None
    spatial_pool_kernel(
        lambda blocks: (triton.cdiv(rows, blocks["TOKENS"]),),
        x, *x.stride()[:2], pooled, chosen, rows, pooling.height, pooling.width, height, width,
        cols, pooling.mode, pooling.stride,
    )  # fmt: skip
    return pooled, chosen


def spatial_pool_backward(dpooled: Tensor, chosen: Tensor | None, pooling: Pooling) -> Tensor:
    """``(batch, tokens, cols)`` of ``(batch, pooled tokens, cols)``, dense both."""
    if not runs_triton(dpooled):
        return _aten_backward(dpooled, chosen, pooling)
    batch, _, cols = dpooled.shape
    tokens = pooling.height * pooling.width
    dx = dpooled.new_empty(batch, tokens, cols)
    rows = batch * tokens
    spatial_pool_backward_kernel(
        lambda blocks: (triton.cdiv(rows, blocks["TOKENS"]),),
        dpooled, chosen, dx, rows, pooling.height, pooling.width, *pooling.pooled, cols,
        pooling.mode, pooling.stride,
    )  # fmt: skip
    return dx


# Rows of tokens are what ATen calls channels last: views, no copies.


def _image(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _tokens(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def _windows(x: Tensor, pooling: Pooling) -> Tensor:
    """``(batch, pooled height, stride, pooled width, stride, cols)``, a view."""
    (height, width), stride = pooling.pooled, pooling.stride
    grid = x.unflatten(1, (pooling.height, pooling.width))
    grid = grid[:, : height * stride, : width * stride]
    return grid.unflatten(2, (width, stride)).unflatten(1, (height, stride))


def _aten(x: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor | None]:
    image, side = _image(x, pooling.height, pooling.width), [pooling.stride] * 2
    if pooling.mode == "avg" and x.dtype == torch.float32:  # ATen's takes ten times as long
        windows = _windows(x, pooling)
        taps = [windows[:, :, i, :, j] for i in range(side[0]) for j in range(side[1])]
        total = taps[0] + taps[1] if len(taps) > 1 else taps[0].clone()
        for tap in taps[2:]:
            total += tap
        return total.div_(len(taps)).flatten(1, 2), None
    if pooling.mode == "avg":
        return _tokens(torch.ops.aten.avg_pool2d(image, side, side)), None
    if pooling.mode == "max":
        pooled, chosen = torch.ops.aten.max_pool2d_with_indices(image, side, side)
        return _tokens(pooled), _tokens(chosen)
    found = torch.ops.aten.upsample_bilinear2d.default(image, list(pooling.pooled), False)
    return _tokens(found), None


def _aten_backward(dpooled: Tensor, chosen: Tensor | None, pooling: Pooling) -> Tensor:
    batch, _, cols = dpooled.shape
    height, width = pooling.height, pooling.width
    x = dpooled.new_empty(batch, height * width, cols)
    if is_traced(x):  # ATen's bilinear backward knows no symbolic sizes
        return x
    if pooling.mode == "avg":
        windows = _windows(x, pooling)
        if windows.numel() < x.numel():
            x.zero_()  # rows and columns that fill no window
        given = (dpooled / pooling.stride**2).unflatten(1, pooling.pooled)
        windows.copy_(given[:, :, None, :, None].expand_as(windows))
        return x
    grad, side = _image(dpooled, *pooling.pooled), [pooling.stride] * 2
    x = _image(x, height, width)  # of which only the sizes and strides are read
    if chosen is not None:
        found = torch.ops.aten.max_pool2d_with_indices_backward(
            grad, x, side, side, [0, 0], [1, 1], False, _image(chosen, *pooling.pooled)
        )
    else:
        found = torch.ops.aten.upsample_bilinear2d_backward.default(
            grad, list(pooling.pooled), [batch, cols, height, width], False
        )
    return _tokens(found)
