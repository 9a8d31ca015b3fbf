"""The forward kernel of `cross_attention`, and its launch.

A program takes a tile of rows (the queries of all heads that share a key head, of one image) and a
share of the keys. If the keys are split, a second kernel combines the partial results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._attention_arguments import Masks, Strided, mask_arguments
from ._attention_forward_tiles import attend, head_and_query, new_sums
from ._attention_gradient_tiles import WIDE_STRIDE
from ._attention_shares import combine_splits_kernel, forward_splits, key_splits, log_sum_exp
from ._attention_tiles import LOG2_E, SIZES, load_parts, store_parts
from ._attention_tilings import forward_tiling
from ._launcher import Config, capability, kernel, precision
from ._online_softmax import one_column
from ._sizes import cdiv, next_power_of_2
from ._triton import tl, triton

CONFIGS = (  # `forward_tiling` chooses by their numbers
    Config({"BLOCK_N": 16}, num_warps=4, num_stages=2),
    Config({"BLOCK_N": 32}, num_warps=4, num_stages=2),
    Config({"BLOCK_N": 64}, num_warps=4, num_stages=2),
    Config({"BLOCK_N": 64}, num_warps=4, num_stages=3),
    Config({"BLOCK_N": 32}, num_warps=4, num_stages=2, registers=168),
    Config({"BLOCK_N": 32}, num_warps=4, num_stages=2, registers=255),
)


@kernel(*CONFIGS, exclusive=True)
@triton.jit(do_not_specialize=[*SIZES, "keys2", "splits"])
def cross_attention_kernel(
    q_ptr, q_batch, q_head, q_query,  # (batch, heads, queries, d)
    k_ptr, k_batch, k_head, k_key, v_ptr, v_batch, v_head, v_key,  # (batch, kv_heads, keys, d)
    k2_ptr, k2_batch, k2_head, k2_key, v2_ptr, v2_batch, v2_head, v2_key,  # or None
    bias_ptr, bias_batch, bias_head, bias_query, bias_key,
    mask_ptr, mask_batch, mask_key,  # (batch, keys + keys2) bytes
    seed_ptr, drop_below, survivor_scale,
    o_ptr,  # (batch, queries, heads, d); with several splits (splits, count, d) fp32, and
    stats_ptr,  # (splits, 2, count) fp32: largest score, sum of exponentials
    lse_ptr, low_ptr,  # (count,) fp32, as o; or None: see `attention_forward`
    kv_heads, group, queries, rows, keys, keys2, count, splits, scale,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    ONE_HEAD: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr, PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split, program = (program % splits).to(tl.int64), program // splits
    tiles = tl.cdiv(rows, BLOCK_M)
    row = ((program % tiles).to(tl.int64) * BLOCK_M).to(tl.int32) + tl.arange(0, BLOCK_M)
    kv_head = (program // tiles % kv_heads).to(tl.int64)
    image = (program // tiles // kv_heads).to(tl.int64)
    inside_rows = row < rows
    head, query = head_and_query(row, kv_head, group, queries, ONE_HEAD)
    batch_head = image * kv_heads * group + head
    q_ptr += image * q_batch
    q1, q2 = load_parts(q_ptr, head * q_head + query * q_query, inside_rows, d, D1, D2)
    scale *= LOG2_E
    largest, total, acc1, acc2 = new_sums(BLOCK_M, D1, D2, KEYS, q1.dtype)
    # The tiles of both sources have consecutive numbers, which are divided among the splits.
    tiles1 = tl.cdiv(keys, BLOCK_N)
    share = tl.cdiv(tiles1 + tl.cdiv(keys2, BLOCK_N), splits)
    start, end = split * share * BLOCK_N, (split + 1) * share * BLOCK_N
    largest, total, acc1, acc2 = attend(
        largest, total, acc1, acc2, q1, q2,
        k_ptr + image * k_batch + kv_head * k_head, k_key,
        v_ptr + image * v_batch + kv_head * v_head, v_key,
        tl.minimum(start, keys).to(tl.int32), tl.minimum(end, keys).to(tl.int32), keys, 0,
        image, head, query, batch_head, inside_rows,
        bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
        seed_ptr, drop_below, scale, d, D1, D2, KEYS, WIDE, PRECISION, BLOCK_N,
    )  # fmt: skip
    if k2_ptr is not None:
        start, end = start - tiles1.to(tl.int64) * BLOCK_N, end - tiles1.to(tl.int64) * BLOCK_N
        largest, total, acc1, acc2 = attend(
            largest, total, acc1, acc2, q1, q2,
            k2_ptr + image * k2_batch + kv_head * k2_head, k2_key,
            v2_ptr + image * v2_batch + kv_head * v2_head, v2_key,
            tl.maximum(start, 0).to(tl.int32), tl.minimum(end, keys2).to(tl.int32), keys2, keys,
            image, head, query, batch_head, inside_rows,
            bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
            seed_ptr, drop_below, scale, d, D1, D2, KEYS, WIDE, PRECISION, BLOCK_N,
        )  # fmt: skip
    if KEYS == 1:
        total = one_column(total, q1.dtype)
    if seed_ptr is not None:
        acc1, acc2 = acc1 * survivor_scale, acc2 * survivor_scale
    if PARTIAL:
        at = batch_head * queries + query
        stats_ptr += split * 2 * count
        o_ptr += split * count * d
        tl.store(stats_ptr + at, largest, mask=inside_rows)
        tl.store(stats_ptr + count + at, total, mask=inside_rows)
        _store(o_ptr, at * d, inside_rows, acc1, acc2, d, D1, D2, KEYS)
    else:
        inverse = tl.expand_dims(1.0 / tl.where(total == 0.0, 1.0, total), KEYS)
        acc1, acc2 = acc1 * inverse, acc2 * inverse  # all keys masked: zeros
        out_row = ((image * queries + query) * kv_heads * group + head) * d
        high1, high2 = acc1.to(q1.dtype), acc2.to(q1.dtype)
        _store(o_ptr, out_row, inside_rows, high1, high2, d, D1, D2, KEYS)
        if lse_ptr is not None:
            lse = log_sum_exp(largest, total)
            tl.store(lse_ptr + batch_head * queries + query, lse, mask=inside_rows)
            low1 = (acc1 - high1.to(tl.float32)).to(q1.dtype)
            low2 = (acc2 - high2.to(tl.float32)).to(q1.dtype)
            _store(low_ptr, out_row, inside_rows, low1, low2, d, D1, D2, KEYS)


@triton.jit
def _store(
    ptr, at, inside, x1, x2, d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """Store the rows of a tile, which lies ``[features, rows]`` if KEYS is 0."""
    if KEYS == 0:
        x1, x2 = tl.trans(x1), tl.trans(x2)
    store_parts(ptr, at, inside, x1, x2, d, D1, D2)


def launch_forward(
    sizes: Sequence[int],
    sources: Sequence[Strided],
    masks: Masks,
    scale: float,
    dropout: float,
    o: Tensor,
    lse: Tensor | None,
    low: Tensor | None,
) -> None:
    """Fill o, lse and low, in memory ``(batch, queries, heads, d)``; see `attention_forward`.

    sizes: see `call_sizes`. sources: q, k, v, k2, v2.
    """
    q, k, v, k2, v2 = sources
    batch, heads, kv_heads, queries, keys, keys2, d = sizes
    group, count = heads // kv_heads, batch * heads * queries
    rows, dtype = group * queries, o.dtype
    scored = mask_arguments(masks, dropout, (batch, heads, queries, keys + keys2))
    plain = scored[0] is None and scored[8] is None and scale > 0
    tiles = forward_tiling(capability(o), dtype, rows, d, plain, scored[0] is not None)
    programs = batch * kv_heads * cdiv(rows, tiles.block_m)
    wide = max(k[3], v[3], k2[3], v2[3]) > WIDE_STRIDE
    if tiles.keys_axis == 1:
        splits = forward_splits(programs, keys + keys2, tiles.held)
    else:
        splits = key_splits(programs, keys + keys2)
    out, stats = o, None
    if splits > 1:
        out = o.new_empty(splits, count, d, dtype=torch.float32)
        stats = o.new_empty(splits, 2, count, dtype=torch.float32)
    cross_attention_kernel(
        lambda blocks: (programs * splits,), *q, *k, *v, *k2, *v2, *scored, out, stats, lse, low,
        kv_heads, group, queries, rows, keys, keys2, count, splits, scale,
        d, *tiles.widths, tiles.block_m, group == 1, tiles.keys_axis, wide, splits > 1,
        precision(dtype),
        config=tiles.config,
    )  # fmt: skip
    if splits > 1:
        combine_splits_kernel(
            lambda blocks: (count,), out, stats, o, lse, low, heads, queries, count, splits, d,
            next_power_of_2(d), next_power_of_2(splits),
        )  # fmt: skip
