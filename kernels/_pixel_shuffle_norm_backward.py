"""The kernel of `pixel_shuffle_norm`'s backward; a program takes consecutive merged tokens.

It reads x again and needs no shuffled copy. It loads some tokens while it computes others, and sums
its share of the parameters' gradients.
"""

from __future__ import annotations

from ._launcher import Config, kernel
from ._pipeline import stages
from ._pixel_shuffle_tiles import (
    group_index,
    group_sum,
    group_sums,
    load_parameter,
    merged_channels,
    patch_offsets,
)
from ._sum_shares import store_share
from ._triton import tl, triton


# Two programs of the first config fit on a multiprocessor. The second is for a single program and
# for wide merged tokens.
@kernel(
    Config({"ELEMENTS": 4096}, num_warps=8),
    Config({"ELEMENTS": 4096}, num_warps=16),
    choose=int,
)
@triton.jit(do_not_specialize=["rows", "merged", "per_program", "blocks"])
def pixel_shuffle_norm_backward_kernel(
    dy_ptr,  # (merged, FACTOR ** 2 * cols)
    x_ptr, x_batch, x_token,  # (batch, tokens, cols) at these strides, inner 1
    index_ptr,  # (merged, FACTOR ** 2) or None
    weight_ptr,  # (cols,) or, if AFTER, (FACTOR ** 2 * cols,)
    mean_ptr, rstd_ptr,  # written by the forward
    dx_ptr, dx_batch,  # (batch, tokens, cols), dense, or None
    dweight_ptr, dbias_ptr,  # like the weight, or None
    shares_ptr, shares_row,  # (programs, size of both) fp32, or None for one program
    tokens, rows, merged, per_program, blocks, blocks_across, width, cols,
    FACTOR: tl.constexpr, BY_CHANNEL: tl.constexpr, NORM: tl.constexpr, AFTER: tl.constexpr,
    POSITIONS: tl.constexpr, COLS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ELEMENTS // (POSITIONS * COLS) if ELEMENTS > POSITIONS * COLS else 1
    BITS: tl.constexpr = dy_ptr.dtype.element_ty.primitive_bitwidth
    STAGES: tl.constexpr = stages(BITS, 2 * TOKENS * POSITIONS * COLS, 8 * ELEMENTS, 2)
    program = tl.program_id(0).to(tl.int64)
    p, c = tl.arange(0, POSITIONS), tl.arange(0, COLS)
    channel = merged_channels(p, c, cols, FACTOR, BY_CHANNEL)
    channel_inside = (p < FACTOR * FACTOR)[:, None] & (c < cols)[None, :]
    weight = load_parameter(weight_ptr, channel, p, c, channel_inside, cols, AFTER)
    if NORM == "gemma":
        weight += 1.0
    size = cols * FACTOR * FACTOR if AFTER else cols
    dweight = tl.zeros([TOKENS, POSITIONS, COLS], dtype=tl.float32)
    dbias = tl.zeros([TOKENS, POSITIONS, COLS], dtype=tl.float32)
    first = program * per_program
    last = tl.minimum(first + per_program, merged)
    for start in tl.range(0, per_program, TOKENS, num_stages=STAGES):
        token = (first + start + tl.arange(0, TOKENS)).to(tl.int32)
        patches = (token < last)[:, None] & (p < FACTOR * FACTOR)[None, :]
        source, patch_inside = patch_offsets(
            token, p, patches, index_ptr, x_batch, x_token,
            tokens, rows, blocks, blocks_across, width, FACTOR,
        )  # fmt: skip
        inside = patches[:, :, None] & (c < cols)[None, None, :]
        at = x_ptr + source[:, :, None] + c[None, None, :]
        x = tl.load(at, mask=patch_inside[:, :, None] & inside, other=0.0).to(tl.float32)
        merged_row = dy_ptr + token.to(tl.int64)[:, None, None] * cols * (FACTOR * FACTOR)
        dy = tl.load(merged_row + channel[None, :, :], mask=inside, other=0.0).to(tl.float32)
        group = group_index(token, p, FACTOR, AFTER)
        group_inside = (token < last)[:, None, None] if AFTER else patches[:, :, None]
        rstd = tl.load(rstd_ptr + group, mask=group_inside, other=0.0)
        if NORM == "layer":
            x -= tl.load(mean_ptr + group, mask=group_inside, other=0.0)
        # What lies outside is 0 in dy and rstd, so it adds nothing to any sum.
        unit = x * rstd
        # The place of this sum, here or behind dx, decides whether registers spill.
        if AFTER and dweight_ptr is not None:
            dweight += dy * unit
        if dbias_ptr is not None:
            dbias += dy
        if dx_ptr is not None:
            dunit = dy * weight
            if NORM == "layer":
                along, shift = group_sums(dunit * unit, dunit, AFTER)
                dunit -= shift / size
            else:
                along = group_sum(dunit * unit, AFTER)
            dx = dunit - unit * (along / size)
            to, _ = patch_offsets(
                token, p, patches, index_ptr, dx_batch, cols,
                tokens, rows, blocks, blocks_across, width, FACTOR,
            )  # fmt: skip
            at = dx_ptr + to[:, :, None] + c[None, None, :]
            tl.store(at, (dx * rstd).to(dx_ptr.dtype.element_ty), patch_inside[:, :, None] & inside)
        if not AFTER and dweight_ptr is not None:
            dweight += dy * unit
    at = program * shares_row
    if dweight_ptr is not None:
        _store(dweight_ptr, shares_ptr, at, dweight, channel, c, channel_inside, cols, AFTER)
        for _ in tl.static_range(FACTOR * FACTOR if AFTER else 1):
            at += cols  # not a product, which may overflow 32 bits
    if dbias_ptr is not None:
        _store(dbias_ptr, shares_ptr, at, dbias, channel, c, channel_inside, cols, AFTER)


@triton.jit
def _store(
    gradient_ptr, shares_ptr, at, by_token, channel, c, channel_inside, cols, AFTER: tl.constexpr
):
    """Store a program's share of a parameter's gradient."""
    share = tl.sum(by_token, axis=0)
    if AFTER:
        store_share(gradient_ptr, shares_ptr, at, share, channel, channel_inside)
    else:
        store_share(gradient_ptr, shares_ptr, at, tl.sum(share, axis=0), c, c < cols)
