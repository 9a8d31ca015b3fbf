"""Blocks of ``factor x factor`` patches into one token each, with the norm before or after.

One read and one write each way: the shuffle is where rows are loaded from. A program holds whole
tokens, ``[TOKENS, POSITIONS, COLS]``: patches of a block by channels. Backward reads x once more
instead of a shuffled copy; programs take a fixed run of tokens and leave their shares of the
parameters' gradients in a row of their own: no atomics, one order of summation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._launcher import Config, dense, is_traced, kernel, runs_triton
from ._patch_blocks import Blocks, Norm
from ._pixel_shuffle_norm_cpu import norm_backward, norm_forward, shuffled, unshuffled
from ._triton import tl, triton

MAX_PROGRAMS = 512  # of backward: four to a multiprocessor of the largest GPUs


@triton.jit
def _sources(
    token, p, inside, index_ptr, x_batch, x_token,
    tokens, rows, blocks, blocks_across, width, FACTOR: tl.constexpr,
):  # fmt: skip
    """Where in x the patches of each merged token are, ``[TOKENS, POSITIONS]``, and which are."""
    if index_ptr is not None:
        at = index_ptr + token.to(tl.int64)[:, None] * (FACTOR * FACTOR) + p[None, :]
        row = tl.load(at, mask=inside, other=0).to(tl.int64)
        inside = inside & (row >= 0) & (row < rows)  # a wrong index is never a wild address
        return row // tokens * x_batch + row % tokens * x_token, inside
    else:
        image, block = (token // blocks).to(tl.int64), token % blocks
        y = (block // blocks_across).to(tl.int64)[:, None] * FACTOR + p[None, :] // FACTOR
        x = (block % blocks_across).to(tl.int64)[:, None] * FACTOR + p[None, :] % FACTOR
        return image[:, None] * x_batch + (y * width + x) * x_token, inside


@triton.jit
def _channels(p, c, cols, FACTOR: tl.constexpr, BY_CHANNEL: tl.constexpr):
    """The channel of each in a merged token, ``[POSITIONS, COLS]``."""
    if BY_CHANNEL:
        return c[None, :].to(tl.int64) * (FACTOR * FACTOR) + p[:, None]
    else:
        return p.to(tl.int64)[:, None] * cols + c[None, :]


@triton.jit
def _sum(x, AFTER: tl.constexpr):
    """Over what is normed together: the channels of a patch, or those of all patches too."""
    total = tl.sum(x, axis=2, keep_dims=True)
    if AFTER:
        total = tl.sum(total, axis=1, keep_dims=True)
    return total


@triton.jit
def _statistics_at(token, p, FACTOR: tl.constexpr, AFTER: tl.constexpr):
    """The number of each sum of `_sum`."""
    group = token.to(tl.int64)[:, None, None]
    if not AFTER:
        group = group * (FACTOR * FACTOR) + p[None, :, None]
    return group


@triton.jit
def _load_parameter(ptr, channel, p, c, inside, cols, AFTER: tl.constexpr):
    """A weight or bias in fp32, broadcast over what is not normed together."""
    if AFTER:
        return tl.load(ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :, :]
    else:
        return tl.load(ptr + c, mask=c < cols, other=0.0).to(tl.float32)[None, None, :]


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
    source, found = _sources(
        token, p, patches, index_ptr, x_batch, x_token,
        tokens, rows, blocks, blocks_across, width, FACTOR,
    )  # fmt: skip
    merged_row = y_ptr + token.to(tl.int64)[:, None, None] * cols * (FACTOR * FACTOR)
    for start in range(0, cols, COLS):
        c = start + tl.arange(0, COLS)
        inside = (c < cols)[None, None, :]
        at_x = x_ptr + source[:, :, None] + c[None, None, :]
        at_y = merged_row + _channels(p, c, cols, FACTOR, BY_CHANNEL)[None, :, :]
        if UNDO:
            tl.store(
                at_x, tl.load(at_y, mask=found[:, :, None] & inside), found[:, :, None] & inside
            )
        else:
            x = tl.load(at_x, mask=found[:, :, None] & inside, other=0.0)
            tl.store(at_y, x, mask=patches[:, :, None] & inside)


@kernel(Config({"ELEMENTS": 4096}, num_warps=8))
@triton.jit(do_not_specialize=["rows", "merged", "blocks"])
def pixel_shuffle_norm_kernel(
    x_ptr, x_batch, x_token,  # (batch, tokens, cols) at these strides, inner 1
    index_ptr,  # (merged, FACTOR ** 2) or None
    weight_ptr, bias_ptr,  # (cols,), or of a merged token if AFTER; the bias may be None
    y_ptr,  # (merged, FACTOR ** 2 * cols)
    mean_ptr, rstd_ptr,  # one for each that is normed, or None
    tokens, rows, merged, blocks, blocks_across, width, cols, eps,
    FACTOR: tl.constexpr, BY_CHANNEL: tl.constexpr, NORM: tl.constexpr, AFTER: tl.constexpr,
    POSITIONS: tl.constexpr, COLS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ELEMENTS // (POSITIONS * COLS) if ELEMENTS > POSITIONS * COLS else 1
    first = (tl.program_id(0).to(tl.int64) * TOKENS).to(tl.int32)  # tokens fit, offsets do not
    token, p, c = first + tl.arange(0, TOKENS), tl.arange(0, POSITIONS), tl.arange(0, COLS)
    patches = (token < merged)[:, None] & (p < FACTOR * FACTOR)[None, :]
    source, found = _sources(
        token, p, patches, index_ptr, x_batch, x_token,
        tokens, rows, blocks, blocks_across, width, FACTOR,
    )  # fmt: skip
    inside = patches[:, :, None] & (c < cols)[None, None, :]
    at = x_ptr + source[:, :, None] + c[None, None, :]
    x = tl.load(at, mask=found[:, :, None] & inside, other=0.0).to(tl.float32)
    size = cols * FACTOR * FACTOR if AFTER else cols
    group = _statistics_at(token, p, FACTOR, AFTER)
    known = (token < merged)[:, None, None] if AFTER else patches[:, :, None]
    if NORM == "layer":
        mean = _sum(x, AFTER) / size
        # Where the mean is far above the spread, its own rounding counts: taken out once more.
        rest = _sum(tl.where(inside, x - mean, 0.0), AFTER) / size
        x = tl.where(inside, x - mean - rest, 0.0)
        if mean_ptr is not None:
            tl.store(mean_ptr + group, mean + rest, mask=known)
    rstd = 1.0 / tl.sqrt(_sum(x * x, AFTER) / size + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + group, rstd, mask=known)
    channel = _channels(p, c, cols, FACTOR, BY_CHANNEL)
    real = (p < FACTOR * FACTOR)[:, None] & (c < cols)[None, :]
    y = x * rstd
    if NORM == "rms":
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
    weight = _load_parameter(weight_ptr, channel, p, c, real, cols, AFTER)
    y *= weight + 1.0 if NORM == "gemma" else weight
    if bias_ptr is not None:
        y += _load_parameter(bias_ptr, channel, p, c, real, cols, AFTER)
    merged_row = y_ptr + token.to(tl.int64)[:, None, None] * cols * (FACTOR * FACTOR)
    tl.store(merged_row + channel[None, :, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@kernel(Config({"ELEMENTS": 4096}, num_warps=8))
@triton.jit(do_not_specialize=["rows", "merged", "per_program", "blocks"])
def pixel_shuffle_norm_backward_kernel(
    dy_ptr,  # (merged, FACTOR ** 2 * cols)
    x_ptr, x_batch, x_token,  # (batch, tokens, cols) at these strides, inner 1
    index_ptr,  # (merged, FACTOR ** 2) or None
    weight_ptr,  # (cols,), or of a merged token if AFTER
    mean_ptr, rstd_ptr,  # as the forward left them
    dx_ptr, dx_batch,  # (batch, tokens, cols), dense, or None
    dweight_ptr, dbias_ptr,  # (programs, of the weight) fp32 or None
    tokens, rows, merged, per_program, blocks, blocks_across, width, cols,
    FACTOR: tl.constexpr, BY_CHANNEL: tl.constexpr, NORM: tl.constexpr, AFTER: tl.constexpr,
    POSITIONS: tl.constexpr, COLS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ELEMENTS // (POSITIONS * COLS) if ELEMENTS > POSITIONS * COLS else 1
    program = tl.program_id(0).to(tl.int64)
    p, c = tl.arange(0, POSITIONS), tl.arange(0, COLS)
    channel = _channels(p, c, cols, FACTOR, BY_CHANNEL)
    real = (p < FACTOR * FACTOR)[:, None] & (c < cols)[None, :]
    weight = _load_parameter(weight_ptr, channel, p, c, real, cols, AFTER)
    if NORM == "gemma":
        weight += 1.0
    size = cols * FACTOR * FACTOR if AFTER else cols
    dweight = tl.zeros([TOKENS, POSITIONS, COLS], dtype=tl.float32)
    dbias = tl.zeros([TOKENS, POSITIONS, COLS], dtype=tl.float32)
    first = program * per_program
    last = tl.minimum(first + per_program, merged)
    for start in range(0, per_program, TOKENS):
        token = (first + start + tl.arange(0, TOKENS)).to(tl.int32)
        patches = (token < last)[:, None] & (p < FACTOR * FACTOR)[None, :]
        source, found = _sources(
            token, p, patches, index_ptr, x_batch, x_token,
            tokens, rows, blocks, blocks_across, width, FACTOR,
        )  # fmt: skip
        inside = patches[:, :, None] & (c < cols)[None, None, :]
        at = x_ptr + source[:, :, None] + c[None, None, :]
        x = tl.load(at, mask=found[:, :, None] & inside, other=0.0).to(tl.float32)
        merged_row = dy_ptr + token.to(tl.int64)[:, None, None] * cols * (FACTOR * FACTOR)
        dy = tl.load(merged_row + channel[None, :, :], mask=inside, other=0.0).to(tl.float32)
        group = _statistics_at(token, p, FACTOR, AFTER)
        known = (token < last)[:, None, None] if AFTER else patches[:, :, None]
        rstd = tl.load(rstd_ptr + group, mask=known, other=0.0)
        if NORM == "layer":
            x -= tl.load(mean_ptr + group, mask=known, other=0.0)
        unit = tl.where(inside, x * rstd, 0.0)
        if dx_ptr is not None:
            dunit = dy * weight
            dx = dunit - unit * (_sum(dunit * unit, AFTER) / size)
            if NORM == "layer":
                dx -= _sum(dunit, AFTER) / size
            to, _ = _sources(
                token, p, patches, index_ptr, dx_batch, cols,
                tokens, rows, blocks, blocks_across, width, FACTOR,
            )  # fmt: skip
            at = dx_ptr + to[:, :, None] + c[None, None, :]
            tl.store(at, (dx * rstd).to(dx_ptr.dtype.element_ty), found[:, :, None] & inside)
        if dweight_ptr is not None:
            dweight += dy * unit
        if dbias_ptr is not None:
            dbias += dy
    if dweight_ptr is not None:
        _store_share(dweight_ptr, dweight, program, channel, c, real, cols, FACTOR, AFTER)
    if dbias_ptr is not None:
        _store_share(dbias_ptr, dbias, program, channel, c, real, cols, FACTOR, AFTER)


@triton.jit
def _store_share(
    ptr, share, program, channel, c, inside, cols, FACTOR: tl.constexpr, AFTER: tl.constexpr
):
    share = tl.sum(share, axis=0)
    if AFTER:
        tl.store(ptr + program * cols * (FACTOR * FACTOR) + channel, share, mask=inside)
    else:
        tl.store(ptr + program * cols + c, tl.sum(share, axis=0), mask=c < cols)


def pixel_shuffle(x: Tensor, blocks: Blocks) -> Tensor:
    """``(merged, factor ** 2 * cols)`` of ``(..., tokens, cols)``."""
    x = _images(x)
    if not runs_triton(x):
        return shuffled(x, blocks)
    batch, _, cols = x.shape
    y = x.new_empty(blocks.count(batch), blocks.positions * cols)
    _shuffle(x, blocks, y, undo=False)
    return y


def pixel_unshuffle(dy: Tensor, blocks: Blocks, shape: tuple[int, ...]) -> Tensor:
    """The gradient of x, of this shape, from that of its shuffle; zeros in rows of no block."""
    if not runs_triton(dy):
        return unshuffled(dy, blocks, shape)
    dx = _empty_gradient(dy, blocks, shape)
    _shuffle(_images(dx), blocks, dy, undo=True)
    return dx


def pixel_shuffle_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: Blocks,
    norm: Norm,
    want_statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(merged, factor ** 2 * cols)`` like x, and means and 1 / deviations where wanted.

    x: ``(..., tokens, cols)``; parameters contiguous, of a patch or of a merged token.
    """
    x = _images(x)
    if not runs_triton(x):
        return norm_forward(x, weight, bias, blocks, norm, want_statistics)
    batch, _, cols = x.shape
    merged = blocks.count(batch)
    y = x.new_empty(merged, blocks.positions * cols)
    groups = merged if norm.after else merged * blocks.positions
    rstd = x.new_empty(groups, dtype=torch.float32) if want_statistics else None
    mean = torch.empty_like(rstd) if rstd is not None and norm.kind == "layer" else None
    positions, block = triton.next_power_of_2(blocks.positions), triton.next_power_of_2(cols)
    held = positions * block
    pixel_shuffle_norm_kernel(
        lambda sizes: (triton.cdiv(merged, max(sizes["ELEMENTS"] // held, 1)),),
        x, *x.stride()[:2], blocks.index, weight, bias, y, mean, rstd,
        *_sizes(x.shape, blocks), cols, norm.eps,
        blocks.factor, blocks.by_channel, norm.kind, norm.after, positions, block,
    )  # fmt: skip
    return y, mean, rstd


def pixel_shuffle_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor,
    blocks: Blocks, norm: Norm, *, want_x: bool, want_weight: bool, want_bias: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of x, like it but dense, and of weight and bias, in fp32.

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
    per_program = max(4, triton.cdiv(merged, MAX_PROGRAMS))
    programs = triton.cdiv(merged, per_program)
    shares = [
        dy.new_empty(programs, weight.shape[0], dtype=torch.float32) if want else None
        for want in (want_weight, want_bias)
    ]
    tokens, rows, _, *across = _sizes(x.shape, blocks)
    pixel_shuffle_norm_backward_kernel(
        lambda sizes: (programs,),
        dy, x, *x.stride()[:2], blocks.index, weight, mean, rstd, dx, x.shape[1] * cols, *shares,
        tokens, rows, merged, per_program, *across, cols,
        blocks.factor, blocks.by_channel, norm.kind, norm.after,
        triton.next_power_of_2(blocks.positions), triton.next_power_of_2(cols),
    )  # fmt: skip
    dweight, dbias = (None if s is None else s.sum(0) for s in shares)
    return dx, dweight, dbias


def _images(x: Tensor) -> Tensor:
    """``(images, tokens, cols)``, copied only if the strides are not those of rows."""
    x = dense(x)
    if x.ndim == 3:
        return x
    return x.unsqueeze(0) if x.ndim == 2 else x.flatten(0, -3)


def _shuffle(x: Tensor, blocks: Blocks, y: Tensor, undo: bool) -> None:
    merged = y.shape[0]
    pixel_shuffle_kernel(
        lambda sizes: (merged,), x, *x.stride()[:2], blocks.index, y,
        *_sizes(x.shape, blocks), x.shape[2], blocks.factor, blocks.by_channel, undo,
        triton.next_power_of_2(blocks.positions),
    )  # fmt: skip


def _sizes(shape: tuple[int, ...], blocks: Blocks) -> tuple[int, ...]:
    """Tokens of an image, rows of all; merged tokens of all, an image, a row of one; its width."""
    batch, tokens, _ = shape
    across = blocks.width // blocks.factor
    down = blocks.height // blocks.factor
    return tokens, batch * tokens, blocks.count(batch), down * across, across, blocks.width


def _empty_gradient(dy: Tensor, blocks: Blocks, shape: tuple[int, ...]) -> Tensor:
    # An index may leave rows out; a grid does not, nor an index as long as there are rows.
    index = blocks.index
    if index is None or is_traced(dy) or index.numel() == math.prod(shape[:-1]):
        return dy.new_empty(shape)
    return dy.new_zeros(shape)
