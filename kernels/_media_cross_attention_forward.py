"""The forward kernel of `media_cross_attention`, and its launch.

A program takes a tile of rows (the queries of all heads that share a key head) and loops over the
keys of the media that some row of the tile attends to. It computes no scores for other media.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._attention_arguments import by_strides
from ._attention_gradient_tiles import WIDE_STRIDE, tile_offsets
from ._attention_shares import combine_splits_kernel, key_splits, log_sum_exp
from ._attention_tiles import (
    LOG2_OF_E,
    SIZES,
    dot_parts,
    load_parts,
    rms_norm,
    store_parts,
)
from ._launcher import capability, dense, kernel, precision
from ._media_attention_tilings import FORWARD, forward_tiling, skips_media
from ._media_mask import (
    first_of_tile,
    is_visible,
    load_index,
    number_of_media,
    tiles_of,
    visible_range,
)
from ._online_softmax import (
    LEAST_SCALE,
    add_exponentials,
    empty_sums,
    exponentials,
    one_column,
    rescaled,
)
from ._sizes import cdiv, next_power_of_2
from ._triton import tl, triton


@triton.jit
def _attend_to_tile(
    largest, total, acc1, acc2, q1, q2, index, unattended_rows, inside_rows,
    k_ptr, k_key, v_ptr, v_key, medium, first, tokens_per_media, scale,
    ATTEND: tl.constexpr, UNATTENDED: tl.constexpr, WIDE: tl.constexpr,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys of a medium from its token ``first`` on."""
    local = tl.arange(0, BLOCK_N)
    inside = first + local < tokens_per_media
    far = tl.cast(medium, tl.int64) * tokens_per_media + first
    at = tile_offsets(local, k_key, WIDE)
    k1, k2 = load_parts(k_ptr + far * k_key, at, inside, d, D1, D2)
    at = tile_offsets(local, v_key, WIDE)
    v1, v2 = load_parts(v_ptr + far * v_key, at, inside, d, D1, D2)
    s = dot_parts(q1, q2, k1, k2, D2, PRECISION)
    seen = is_visible(index, unattended_rows, inside_rows, medium, ATTEND, UNATTENDED)
    s = tl.where(seen[:, None] & inside[None, :], s, -float("inf"))
    p, rescale, largest = exponentials(s, largest, scale, v1.dtype)
    # Sums are rescaled before the first product: a product that runs waits for what comes between.
    total = rescaled(total, rescale, v1.dtype)
    acc1 *= rescale[:, None]
    if D2 > 0:
        acc2 *= rescale[:, None]
    total = add_exponentials(total, p, v1.dtype)
    acc1 = tl.dot(p, v1, acc1, input_precision=PRECISION)
    if D2 > 0:
        acc2 = tl.dot(p, v2, acc2, input_precision=PRECISION)
    return largest, total, acc1, acc2


@kernel(*FORWARD, exclusive=True)
@triton.jit(do_not_specialize=[*SIZES, "media", "splits"])
def media_cross_attention_kernel(
    q_ptr, q_batch, q_head, q_query,  # (batch, heads, queries, d)
    k_ptr, k_batch, k_head, k_key, v_ptr, v_batch, v_head, v_key,  # (batch, kv_heads, keys, d)
    index_ptr,  # (batch, queries) int64
    q_norm_ptr,  # (d,) or None: the queries are not normed
    o_ptr,  # (batch, queries, heads, d); with several splits (splits, count, d) fp32, and
    stats_ptr,  # (splits, 2, count) fp32: largest score, sum of exponentials
    lse_ptr, low_ptr,  # (count,) fp32, as o; each or None: see `media_attention_forward`
    kv_heads, group, queries, rows, media, tokens_per_media, count, splits, scale, eps,
    ATTEND: tl.constexpr, UNATTENDED: tl.constexpr, NESTED: tl.constexpr, WIDE: tl.constexpr,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    PARTIAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split, program = (program % splits).to(tl.int64), program // splits
    tiles = tl.cdiv(rows, BLOCK_M)
    row = ((program % tiles).to(tl.int64) * BLOCK_M).to(tl.int32) + tl.arange(0, BLOCK_M)
    kv_head = (program // tiles % kv_heads).to(tl.int64)
    image = (program // tiles // kv_heads).to(tl.int64)
    inside_rows = row < rows
    head, query = kv_head * group + row // queries, (row % queries).to(tl.int64)
    batch_head = image * kv_heads * group + head
    # Rows of equal weights are loaded as zeros, so their scores are equal. A selection after the
    # load would move q into registers, and each product would wait for the one before.
    there = inside_rows
    if UNATTENDED == "uniform":
        _, equal = load_index(index_ptr + image * queries, query, inside_rows, ATTEND)
        there = inside_rows & (equal == 0)
    q_ptr += image * q_batch
    q1, q2 = load_parts(q_ptr, head * q_head + query * q_query, there, d, D1, D2)
    if q_norm_ptr is not None:
        q1, q2 = rms_norm(q1, q2, there, q_norm_ptr, eps, d, D1, D2)
    index, unattended_rows, low, high, union = visible_range(
        index_ptr + image * queries, query, inside_rows, media, ATTEND, UNATTENDED
    )
    k_ptr += image * k_batch + kv_head * k_head
    v_ptr += image * v_batch + kv_head * v_head
    largest, total = empty_sums(BLOCK_M, q1.dtype)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 16], tl.float32)
    # The tiles of the media that are seen have consecutive numbers, divided among the splits.
    per_medium = tl.cdiv(tokens_per_media, BLOCK_N)
    if NESTED:
        tiles = number_of_media(union, low, high).to(tl.int64) * per_medium
        share = tl.cdiv(tiles, splits)
        start, end = (split * share).to(tl.int32), ((split + 1) * share).to(tl.int32)
        for medium in range(low, high):
            if (union >> tl.cast(medium, tl.int64)) & 1 != 0:
                for tile in range(tl.maximum(start, 0), tl.minimum(end, per_medium)):
                    largest, total, acc1, acc2 = _attend_to_tile(
                        largest, total, acc1, acc2, q1, q2, index, unattended_rows, inside_rows,
                        k_ptr, k_key, v_ptr, v_key, medium, first_of_tile(tile, BLOCK_N),
                        tokens_per_media, scale, ATTEND, UNATTENDED, WIDE, d, D1, D2, BLOCK_N,
                        PRECISION,
                    )  # fmt: skip
                start -= per_medium
                end -= per_medium
    else:
        first, end = tiles_of(low, high, per_medium)
        share = tl.cdiv(end - first, splits)
        first += (split * share).to(tl.int32)
        for at in range(first, tl.minimum(first + share, end)):
            largest, total, acc1, acc2 = _attend_to_tile(
                largest, total, acc1, acc2, q1, q2, index, unattended_rows, inside_rows,
                k_ptr, k_key, v_ptr, v_key, at // per_medium,
                first_of_tile(at % per_medium, BLOCK_N),
                tokens_per_media, scale, ATTEND, UNATTENDED, WIDE, d, D1, D2, BLOCK_N, PRECISION,
            )  # fmt: skip
    total = one_column(total, q1.dtype)
    # Computed again: registers that hold them through the loop would spill.
    row += tl.minimum(media, 0)
    head, query = kv_head * group + row // queries, (row % queries).to(tl.int64)
    inside_rows = row < rows
    batch_head = image * kv_heads * group + head
    if PARTIAL:
        at = batch_head * queries + query
        stats_ptr += split * 2 * count
        o_ptr += split * count * d
        tl.store(stats_ptr + at, largest, mask=inside_rows)
        tl.store(stats_ptr + count + at, total, mask=inside_rows)
        store_parts(o_ptr, at * d, inside_rows, acc1, acc2, d, D1, D2)
    else:
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)[:, None]  # a row without media: zeros
        acc1, acc2 = acc1 * inverse, acc2 * inverse
        high1, high2 = acc1.to(q1.dtype), acc2.to(q1.dtype)
        out_row = ((image * queries + query) * kv_heads * group + head) * d
        store_parts(o_ptr, out_row, inside_rows, high1, high2, d, D1, D2)
        if lse_ptr is not None:
            lse = log_sum_exp(largest, total)
            tl.store(lse_ptr + batch_head * queries + query, lse, mask=inside_rows)
        if low_ptr is not None:
            low1 = (acc1 - high1.to(tl.float32)).to(q1.dtype)
            low2 = (acc2 - high2.to(tl.float32)).to(q1.dtype)
            store_parts(low_ptr, out_row, inside_rows, low1, low2, d, D1, D2)


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, q_norm: Tensor | None,
    tokens_per_media: int, attend: str, unattended: str, scale: float, eps: float, o: Tensor,
    lse: Tensor | None, low: Tensor | None,
) -> None:  # fmt: skip
    """Fill o, lse and low, in memory ``(batch, queries, heads, d)``."""
    batch, heads, queries, d = q.shape
    kv_heads, keys = k.shape[1:3]
    rows, count = heads // kv_heads * queries, batch * heads * queries
    if scale < 0:
        q, scale = dense(-q), -scale
    scale = max(scale, LEAST_SCALE)
    tiles = forward_tiling(capability(q), rows, d, q.dtype)
    programs = batch * kv_heads * cdiv(rows, tiles.block_m)
    # With "latest" a row attends to the keys of one medium, else possibly to all keys.
    seen = tokens_per_media if attend == "latest" else keys
    splits = key_splits(programs, seen, tiles.held)
    out, stats = o, None
    if splits > 1:
        out = q.new_empty(splits, count, d, dtype=torch.float32)
        stats = q.new_empty(splits, 2, count, dtype=torch.float32)
    media_cross_attention_kernel(
        lambda blocks: (programs * splits,),
        *by_strides(q), *by_strides(k), *by_strides(v), index, q_norm, out, stats, lse, low,
        kv_heads, heads // kv_heads, queries, rows, keys // tokens_per_media, tokens_per_media,
        count, splits, scale * LOG2_OF_E, eps, attend, unattended,  # scores are to base 2
        skips_media(q, attend, tokens_per_media), max(k.stride(2), v.stride(2)) > WIDE_STRIDE,
        d, *tiles.widths, tiles.block_m, splits > 1, precision(q.dtype),
        config=tiles.config,
    )  # fmt: skip
    if splits > 1:
        combine_splits_kernel(
            lambda blocks: (count,), out, stats, o, lse, low, heads, queries, count, splits, d,
            next_power_of_2(d), next_power_of_2(splits),
        )  # fmt: skip
