"""Merges blocks of ``factor x factor`` patches into one token each, normed before or after.

The shuffle is the addressing of the loads, so there is one read and one write in each direction. A
program holds whole merged tokens, ``[TOKENS, POSITIONS, COLS]``: the patches of a block by
channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._launcher import Config, dense, is_traced, kernel, runs_triton
from ._patch_blocks import Blocks, Norm
from ._pixel_shuffle_norm_backward import pixel_shuffle_norm_backward_kernel
from ._pixel_shuffle_norm_cpu import norm_backward, norm_forward, shuffled, unshuffled
from ._pixel_shuffle_tiles import (
    group_index,
    group_sum,
    load_parameter,
    merged_channels,
    patch_offsets,
)
from ._sizes import cdiv, next_power_of_2
from ._sum_shares import new_shares, split_rows, sum_shares
from ._triton import tl, triton


@kernel(Config({"ELEMENTS": 4096}, num_warps=8))
@triton.jit(do_not_specialize=["rows", "merged", "blocks"])
def pixel_shuffle_kernel(
    x_ptr, x_batch, x_token,  # (batch, tokens, cols) at these strides, inner 1
    index_ptr,  # (merged, FACTOR ** 2) or None
    y_ptr,  # (merged, FACTOR ** 2 * cols)
    tokens, rows, merged, blocks, blocks_across, width, cols,
    FACTOR: tl.constexpr, BY_CHANNEL: tl.constexpr, UNDO: tl.constexpr,
    POSITIONS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    COLS: tl.constexpr = ELEMENTS // POSITIONS if ELEMENTS > POSITIONS else 1
    token = tl.program_id(0) + tl.arange(0, 1)
    p = tl.arange(0, POSITIONS)
    patches = (token < merged)[:, None] & (p < FACTOR * FACTOR)[None, :]
    source, patch_inside = patch_offsets(
        token, p, patches, index_ptr, x_batch, x_token,
        tokens, rows, blocks, blocks_across, width, FACTOR,
    )  # fmt: skip
    merged_row = y_ptr + token.to(tl.int64)[:, None, None] * cols * (FACTOR * FACTOR)
    for start in range(0, cols, COLS):
        c = start + tl.arange(0, COLS)
        inside = (c < cols)[None, None, :]
        at_x = x_ptr + source[:, :, None] + c[None, None, :]
        at_y = merged_row + merged_channels(p, c, cols, FACTOR, BY_CHANNEL)[None, :, :]
        if UNDO:
            tl.store(
                at_x,
                tl.load(at_y, mask=patch_inside[:, :, None] & inside),
                patch_inside[:, :, None] & inside,
            )
        else:
            x = tl.load(at_x, mask=patch_inside[:, :, None] & inside, other=0.0)
            tl.store(at_y, x, mask=patches[:, :, None] & inside)


@kernel(Config({"ELEMENTS": 4096}, num_warps=8))
@triton.jit(do_not_specialize=["rows", "merged", "blocks"])
def pixel_shuffle_norm_kernel(
    x_ptr, x_batch, x_token,  # (batch, tokens, cols) at these strides, inner 1
    index_ptr,  # (merged, FACTOR ** 2) or None
    weight_ptr, bias_ptr,  # (cols,) or, if AFTER, (FACTOR ** 2 * cols,); the bias may be None
    y_ptr,  # (merged, FACTOR ** 2 * cols)
    mean_ptr, rstd_ptr,  # one per normed group, or None
    tokens, rows, merged, blocks, blocks_across, width, cols, eps,
    FACTOR: tl.constexpr, BY_CHANNEL: tl.constexpr, NORM: tl.constexpr, AFTER: tl.constexpr,
    POSITIONS: tl.constexpr, COLS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ELEMENTS // (POSITIONS * COLS) if ELEMENTS > POSITIONS * COLS else 1
    first = (tl.program_id(0).to(tl.int64) * TOKENS).to(tl.int32)  # int32 holds tokens, not offsets
    token, p, c = first + tl.arange(0, TOKENS), tl.arange(0, POSITIONS), tl.arange(0, COLS)
    patches = (token < merged)[:, None] & (p < FACTOR * FACTOR)[None, :]
    source, patch_inside = patch_offsets(
        token, p, patches, index_ptr, x_batch, x_token,
        tokens, rows, blocks, blocks_across, width, FACTOR,
    )  # fmt: skip
    inside = patches[:, :, None] & (c < cols)[None, None, :]
    at = x_ptr + source[:, :, None] + c[None, None, :]
    x = tl.load(at, mask=patch_inside[:, :, None] & inside, other=0.0).to(tl.float32)
    size = cols * FACTOR * FACTOR if AFTER else cols
    group = group_index(token, p, FACTOR, AFTER)
    group_inside = (token < merged)[:, None, None] if AFTER else patches[:, :, None]
    if NORM == "layer":
        mean = group_sum(x, AFTER) / size
        # If the mean is far larger than the deviation, its rounding error matters: subtract the
        # mean of what remains too.
        rest = group_sum(tl.where(inside, x - mean, 0.0), AFTER) / size
        x = tl.where(inside, x - mean - rest, 0.0)
        if mean_ptr is not None:
            tl.store(mean_ptr + group, mean + rest, mask=group_inside)
    rstd = 1.0 / tl.sqrt(group_sum(x * x, AFTER) / size + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + group, rstd, mask=group_inside)
    channel = merged_channels(p, c, cols, FACTOR, BY_CHANNEL)
    channel_inside = (p < FACTOR * FACTOR)[:, None] & (c < cols)[None, :]
    y = x * rstd
    if NORM == "rms":
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
    weight = load_parameter(weight_ptr, channel, p, c, channel_inside, cols, AFTER)
    y *= weight + 1.0 if NORM == "gemma" else weight
    if bias_ptr is not None:
        y += load_parameter(bias_ptr, channel, p, c, channel_inside, cols, AFTER)
    merged_row = y_ptr + token.to(tl.int64)[:, None, None] * cols * (FACTOR * FACTOR)
    tl.store(merged_row + channel[None, :, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def pixel_shuffle(x: Tensor, blocks: Blocks, shape: tuple[int, ...]) -> Tensor:
    """Shuffle ``(..., tokens, cols)`` into this shape: merged tokens of ``factor ** 2 * cols``."""
    x = _images(x)
    if not runs_triton(x):
        return shuffled(x, blocks).view(shape)
    y = x.new_empty(shape)
    _shuffle(x, blocks, y, blocks.count(x.shape[0]), undo=False)
    return y


def pixel_unshuffle(dy: Tensor, blocks: Blocks, shape: tuple[int, ...]) -> Tensor:
    """The gradient of x, with this shape, from ``(merged, factor ** 2 * cols)``.

    Rows outside of all blocks are zero.
    """
    if not runs_triton(dy):
        return unshuffled(dy, blocks, shape)
    dx = _empty_gradient(dy, blocks, shape)
    _shuffle(_images(dx), blocks, dy, dy.shape[0], undo=True)
    return dx


def pixel_shuffle_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: Blocks,
    norm: Norm,
    want_statistics: bool,
    shape: tuple[int, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the merged tokens and, if wanted, their means and 1 / standard deviations.

    x: ``(..., tokens, cols)``; weight, bias: contiguous, ``(cols,)`` or, for a norm of merged
    tokens, ``(factor ** 2 * cols,)``. shape: of the result, ``(..., factor ** 2 * cols)``.
    """
    x = _images(x)
    if not runs_triton(x):
        y, mean, rstd = norm_forward(x, weight, bias, blocks, norm, want_statistics)
        return y.view(shape), mean, rstd
    batch, _, cols = x.shape
    merged = blocks.count(batch)
    y = x.new_empty(shape)
    groups = merged if norm.after else merged * blocks.positions
    rstd = x.new_empty(groups, dtype=torch.float32) if want_statistics else None
    mean = torch.empty_like(rstd) if rstd is not None and norm.kind == "layer" else None
    positions, block = next_power_of_2(blocks.positions), next_power_of_2(cols)
    held = positions * block
    pixel_shuffle_norm_kernel(
        lambda sizes: (cdiv(merged, max(sizes["ELEMENTS"] // held, 1)),),
        x, *x.stride()[:2], blocks.index, weight, bias, y, mean, rstd,
        *_sizes(x.shape, blocks, merged), cols, norm.eps,
        blocks.factor, blocks.by_channel, norm.kind, norm.after, positions, block,
    )  # fmt: skip
    return y, mean, rstd


def pixel_shuffle_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor,
    blocks: Blocks, norm: Norm, *, want_x: bool, want_weight: bool, want_bias: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of x (dense, in x's shape), weight and bias (like the weight); None if not wanted.

    dy: ``(merged, factor ** 2 * cols)``, contiguous.
    """
    shape, x = x.shape, _images(x)
    if not runs_triton(dy):
        dx, dweight, dbias = norm_backward(
            dy, x, weight, mean, rstd, blocks, norm, (want_x, want_weight, want_bias)
        )
        return dx if dx is None else dx.view(shape), dweight, dbias
    dx = _empty_gradient(dy, blocks, shape) if want_x else None
    merged, cols = dy.shape[0], x.shape[2]
    dweight, dbias = (torch.empty_like(weight) if w else None for w in (want_weight, want_bias))
    positions, block = next_power_of_2(blocks.positions), next_power_of_2(cols)
    per_program, programs = split_rows(merged, 1, wide := positions * block > 4096)
    shares, shares_row = new_shares(programs, dweight, dbias)
    tokens, rows, _, *across = _sizes(x.shape, blocks, merged)
    pixel_shuffle_norm_backward_kernel(
        lambda sizes: (programs,), dy, x, *x.stride()[:2], blocks.index, weight, mean, rstd, dx,
        x.shape[1] * cols, dweight, dbias, shares, shares_row, tokens, rows, merged, per_program,
        *across, cols, blocks.factor, blocks.by_channel, norm.kind, norm.after, positions, block,
        size=wide or programs == 1,
    )  # fmt: skip
    sum_shares(shares, dweight, dbias)
    return dx, dweight, dbias


def _images(x: Tensor) -> Tensor:
    """x as ``(images, tokens, cols)`` with a last stride of 1, copied only if necessary."""
    x = dense(x)
    if x.ndim == 3:
        return x
    return x.unsqueeze(0) if x.ndim == 2 else x.flatten(0, -3)


def _shuffle(x: Tensor, blocks: Blocks, y: Tensor, merged: int, undo: bool) -> None:
    pixel_shuffle_kernel(
        lambda sizes: (merged,), x, *x.stride()[:2], blocks.index, y,
        *_sizes(x.shape, blocks, merged), x.shape[2], blocks.factor, blocks.by_channel, undo,
        next_power_of_2(blocks.positions),
    )  # fmt: skip


def _sizes(shape: tuple[int, ...], blocks: Blocks, merged: int) -> tuple[int, ...]:
    """Tokens per image, tokens of all images, merged tokens of all images, then merged tokens per
    image, merged tokens per row of blocks, and the width of the grid.
    """
    batch, tokens, _ = shape
    return tokens, batch * tokens, merged, blocks.per_image, blocks.across, blocks.width


def _empty_gradient(dy: Tensor, blocks: Blocks, shape: tuple[int, ...]) -> Tensor:
    """Memory for the gradient of x, zeroed if an index may omit rows; one as long as x cannot."""
    index = blocks.index
    if index is None or is_traced(dy) or index.numel() == math.prod(shape[:-1]):
        return dy.new_empty(shape)
    return dy.new_zeros(shape)
