"""Backward of `media_cross_attention`, deterministic: no atomics, each sum has one fixed order.

The forward saves its inputs only, as for `_cross_attention_backward`. The first kernel, one program
per tile of rows, computes dq and stores the statistics of the softmax. The second, one program per
medium, finds the first and the last token that attends to it. The third, one program per tile of a
medium's keys, loops over those tokens and computes dk and dv.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._attention_tiles import (
    SIZES,
    dot_parts,
    load_parts,
    mean_step,
    probabilities_and_score_gradients,
    rms_norm,
    rms_norm_backward,
    store_parts,
    strides,
)
from ._attention_tilings import head_parts, tile_divisor
from ._launcher import Config, kernel, precision
from ._media_mask import first_of_tile, is_visible, load_index, tiles_of, visible_range
from ._sizes import cdiv, next_power_of_2
from ._sum_shares import sum_shares
from ._triton import tl, triton


@triton.jit
def _scores_and_dp(
    k1, k2, v1, v2, q1, q2, do1, do2, inside_keys, seen, unattended_rows, scale,
    UNATTENDED: tl.constexpr, D2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile ``[rows, keys]`` of scores, of whether they have a gradient, and of dp."""
    s = dot_parts(q1, q2, k1, k2, D2, PRECISION) * scale
    scored = seen[:, None] & inside_keys[None, :]
    s = tl.where(scored, s, -float("inf"))
    if UNATTENDED == "uniform":  # the weights are equal and the scores get no gradient
        s = tl.where(scored & unattended_rows[:, None], 0.0, s)
        scored = scored & ~unattended_rows[:, None]
    return s, scored, dot_parts(do1, do2, v1, v2, D2, PRECISION)


@kernel(Config({"BLOCK_N": 64}, num_warps=8, num_stages=1))
@triton.jit(do_not_specialize=[*SIZES, "media"])
def media_query_gradient_kernel(
    q_ptr, q_batch, q_head, q_query,  # (batch, heads, queries, d)
    do_ptr, do_batch, do_head, do_query,
    k_ptr, k_batch, k_head, k_key, v_ptr, v_batch, v_head, v_key,  # (batch, kv_heads, keys, d)
    index_ptr,  # (batch, queries) int64
    q_norm_ptr,  # (d,) or None
    stats_ptr,  # (4, count) fp32 or None: largest score, 1 / sum of exponentials, delta, pivot
    dq_ptr, dq_batch, dq_head, dq_query,  # or None
    dq_norm_ptr,  # (programs, d) fp32 or None
    kv_heads, group, queries, rows, media, tokens_per_media, count, scale, eps,
    ATTEND: tl.constexpr, UNATTENDED: tl.constexpr,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    TILE_DIVISOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = BLOCK_N // TILE_DIVISOR if BLOCK_N // TILE_DIVISOR > 16 else 16
    program = tl.program_id(0)
    tiles = tl.cdiv(rows, BLOCK_M)
    kv_head = (program // tiles % kv_heads).to(tl.int64)
    image = (program // tiles // kv_heads).to(tl.int64)
    row = ((program % tiles).to(tl.int64) * BLOCK_M).to(tl.int32) + tl.arange(0, BLOCK_M)
    inside = row < rows
    head, query = kv_head * group + row // queries, (row % queries).to(tl.int64)
    q1, q2 = load_parts(
        q_ptr + image * q_batch, head * q_head + query * q_query, inside, d, D1, D2
    )  # fmt: skip
    if q_norm_ptr is not None:
        q1, q2 = rms_norm(q1, q2, inside, q_norm_ptr, eps, d, D1, D2)
    do1, do2 = load_parts(
        do_ptr + image * do_batch, head * do_head + query * do_query, inside, d, D1, D2
    )
    index, unattended_rows, low, high = visible_range(
        index_ptr + image * queries, query, inside, media, ATTEND, UNATTENDED
    )
    k_ptr += image * k_batch + kv_head * k_head
    v_ptr += image * v_batch + kv_head * v_head
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    pivot = tl.zeros([BLOCK_M], tl.float32)
    excess = tl.zeros([BLOCK_M], tl.float32)
    total_error, excess_error = total, excess
    per_medium = tl.cdiv(tokens_per_media, TILE)
    start, end = tiles_of(low, high, per_medium)
    for at in range(start, end):
        medium, n = at // per_medium, first_of_tile(at % per_medium, TILE) + tl.arange(0, TILE)
        seen = is_visible(index, unattended_rows, inside, medium, ATTEND, UNATTENDED)
        inside_keys = n < tokens_per_media
        key = medium.to(tl.int64) * tokens_per_media + n
        k1, k2 = load_parts(k_ptr, key * k_key, inside_keys, d, D1, D2)
        v1, v2 = load_parts(v_ptr, key * v_key, inside_keys, d, D1, D2)
        s, _, dp = _scores_and_dp(
            k1, k2, v1, v2, q1, q2, do1, do2, inside_keys, seen, unattended_rows, scale,
            UNATTENDED, D2, PRECISION,
        )  # fmt: skip
        largest, total, pivot, excess, total_error, excess_error = mean_step(
            s, dp, largest, total, pivot, excess, total_error, excess_error, q1.dtype, 1
        )
    largest = tl.where(total == 0.0, 0.0, largest)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    delta = excess * inverse
    if q1.dtype != tl.float32:  # ds is rounded to 16 bits anyway; one number saves registers
        delta += pivot
    if stats_ptr is not None:
        at = stats_ptr + (image * kv_heads * group + head) * queries + query
        tl.store(at, largest, mask=inside)
        tl.store(at + count, inverse, mask=inside)
        tl.store(at + count + count, delta, mask=inside)
        if q1.dtype == tl.float32:
            tl.store(at + count + count + count, pivot, mask=inside)
    if dq_ptr is not None:
        dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
        dq2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 16], tl.float32)
        for at in range(start, end):
            medium, n = at // per_medium, first_of_tile(at % per_medium, TILE) + tl.arange(0, TILE)
            seen = is_visible(index, unattended_rows, inside, medium, ATTEND, UNATTENDED)
            inside_keys = n < tokens_per_media
            key = medium.to(tl.int64) * tokens_per_media + n
            k1, k2 = load_parts(k_ptr, key * k_key, inside_keys, d, D1, D2)
            v1, v2 = load_parts(v_ptr, key * v_key, inside_keys, d, D1, D2)
            s, scored, dp = _scores_and_dp(
                k1, k2, v1, v2, q1, q2, do1, do2, inside_keys, seen, unattended_rows, scale,
                UNATTENDED, D2, PRECISION,
            )  # fmt: skip
            _, ds = probabilities_and_score_gradients(
                s, scored, inside, dp, 1.0, largest, inverse, pivot, delta, q1.dtype, 1
            )
            if q1.dtype == tl.float32:
                # Tiles are summed on their own first: that has a tenth of the rounding error of one
                # chain of thousands of additions.
                dq1 += tl.dot(ds, k1, input_precision=PRECISION) * scale
                if D2 > 0:
                    dq2 += tl.dot(ds, k2, input_precision=PRECISION) * scale
            else:
                dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
                if D2 > 0:
                    dq2 = tl.dot(ds, k2, dq2, input_precision=PRECISION)
        if q1.dtype != tl.float32:
            dq1, dq2 = dq1 * scale, dq2 * scale
        if q_norm_ptr is not None:
            q1, q2 = load_parts(
                q_ptr + image * q_batch, head * q_head + query * q_query, inside, d, D1, D2
            )
            share = dq_norm_ptr + tl.program_id(0).to(tl.int64) * d
            dq1, dq2 = rms_norm_backward(
                q1, q2, dq1, dq2, inside, q_norm_ptr, share, eps, d, D1, D2
            )  # fmt: skip
        at = image * dq_batch + head * dq_head + query * dq_query
        store_parts(dq_ptr, at, inside, dq1, dq2, d, D1, D2)


@kernel(Config({}, num_warps=4))
@triton.jit(do_not_specialize=["queries", "media"])
def media_reach_kernel(
    index_ptr,  # (batch, queries) int64
    reach_ptr,  # (batch, media, 2) int32: the first token that attends to it, and the last + 1
    queries, media, ATTEND: tl.constexpr, UNATTENDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    image, medium = (program // media).to(tl.int64), program % media
    first, last = queries, queries * 0
    for start in range(0, queries, BLOCK):
        query = start + tl.arange(0, BLOCK)
        inside = query < queries
        index, unattended_rows = load_index(index_ptr + image * queries, query, inside, ATTEND)
        seen = is_visible(index, unattended_rows, inside, medium, ATTEND, UNATTENDED)
        first = tl.minimum(first, tl.min(tl.where(seen, query, queries), axis=0))
        last = tl.maximum(last, tl.max(tl.where(seen, query + 1, 0), axis=0))
    at = reach_ptr + (image * media + medium) * 2
    tl.store(at, first)
    tl.store(at + 1, last)


@kernel(Config({"BLOCK_N": 32}, num_warps=8, num_stages=1))
@triton.jit(do_not_specialize=[*SIZES, "media"])
def media_key_gradient_kernel(
    q_ptr, q_batch, q_head, q_query,  # (batch, heads, queries, d)
    do_ptr, do_batch, do_head, do_query,
    k_ptr, k_batch, k_head, k_key, v_ptr, v_batch, v_head, v_key,  # (batch, kv_heads, keys, d)
    index_ptr, reach_ptr,  # (batch, queries) int64, (batch, media, 2) int32
    q_norm_ptr,  # (d,) or None
    stats_ptr,  # (4, count) fp32, written by media_query_gradient_kernel
    dk_ptr, dk_batch, dk_head, dk_key, dv_ptr, dv_batch, dv_head, dv_key,
    kv_heads, group, queries, media, tokens_per_media, count, scale, eps,
    ATTEND: tl.constexpr, UNATTENDED: tl.constexpr,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    TILE_DIVISOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = BLOCK_N // TILE_DIVISOR if BLOCK_N // TILE_DIVISOR > 16 else 16
    program = tl.program_id(0)
    per_medium = tl.cdiv(tokens_per_media, TILE)
    n = first_of_tile(program % per_medium, TILE) + tl.arange(0, TILE)
    medium = program // per_medium % media
    kv_head = (program // per_medium // media % kv_heads).to(tl.int64)
    image = (program // per_medium // media // kv_heads).to(tl.int64)
    inside_keys = n < tokens_per_media
    key = medium.to(tl.int64) * tokens_per_media + n
    k_ptr += image * k_batch + kv_head * k_head
    v_ptr += image * v_batch + kv_head * v_head
    k1, k2 = load_parts(k_ptr, key * k_key, inside_keys, d, D1, D2)
    v1, v2 = load_parts(v_ptr, key * v_key, inside_keys, d, D1, D2)
    first = tl.load(reach_ptr + (image * media + medium) * 2)
    last = tl.load(reach_ptr + (image * media + medium) * 2 + 1)
    index_ptr += image * queries
    dk1 = tl.zeros([TILE, D1], tl.float32)
    dv1 = tl.zeros([TILE, D1], tl.float32)
    dk2 = tl.zeros([TILE, D2 if D2 > 0 else 16], tl.float32)
    dv2 = tl.zeros([TILE, D2 if D2 > 0 else 16], tl.float32)
    blocks = tl.maximum(tl.cdiv(last - first, BLOCK_M), 0)
    for step in range((blocks.to(tl.int64) * group).to(tl.int32)):
        head = kv_head * group + step // blocks
        token = first + first_of_tile(step % blocks, BLOCK_M) + tl.arange(0, BLOCK_M)
        inside = token < last
        query = token.to(tl.int64)
        q1, q2 = load_parts(
            q_ptr + image * q_batch + head * q_head, query * q_query, inside, d, D1, D2
        )
        if q_norm_ptr is not None:
            q1, q2 = rms_norm(q1, q2, inside, q_norm_ptr, eps, d, D1, D2)
        do1, do2 = load_parts(
            do_ptr + image * do_batch + head * do_head, query * do_query, inside, d, D1, D2
        )
        index, unattended_rows = load_index(index_ptr, query, inside, ATTEND)
        seen = is_visible(index, unattended_rows, inside, medium, ATTEND, UNATTENDED)
        stats = stats_ptr + (image * kv_heads * group + head) * queries + query
        largest = tl.load(stats, mask=inside, other=0.0)
        inverse = tl.load(stats + count, mask=inside, other=0.0)
        delta = tl.load(stats + count + count, mask=inside, other=0.0)
        pivot = delta
        if q1.dtype == tl.float32:
            pivot = tl.load(stats + count + count + count, mask=inside, other=0.0)
        s, scored, dp = _scores_and_dp(
            k1, k2, v1, v2, q1, q2, do1, do2, inside_keys, seen, unattended_rows, scale,
            UNATTENDED, D2, PRECISION,
        )  # fmt: skip
        p, ds = probabilities_and_score_gradients(
            s, scored, inside & seen, dp, 1.0, largest, inverse, pivot, delta, q1.dtype, 1
        )
        dv1 = tl.dot(tl.trans(p), do1, dv1, input_precision=PRECISION)
        dk1 = tl.dot(tl.trans(ds), q1, dk1, input_precision=PRECISION)
        if D2 > 0:
            dv2 = tl.dot(tl.trans(p), do2, dv2, input_precision=PRECISION)
            dk2 = tl.dot(tl.trans(ds), q2, dk2, input_precision=PRECISION)
    dk_ptr += image * dk_batch + kv_head * dk_head
    dv_ptr += image * dv_batch + kv_head * dv_head
    store_parts(dv_ptr, key * dv_key, inside_keys, dv1, dv2, d, D1, D2)
    store_parts(dk_ptr, key * dk_key, inside_keys, dk1 * scale, dk2 * scale, d, D1, D2)


def launch_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, q_norm: Tensor | None,
    tokens_per_media: int, attend: str, unattended: str, scale: float, eps: float,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """Fill those of dq, dk and dv that are not None; return the gradient of q_norm or None."""
    batch, heads, queries, d = q.shape
    kv_heads, keys = k.shape[1:3]
    media, group = keys // tokens_per_media, heads // kv_heads
    rows, count = group * queries, batch * heads * queries
    block = 16 if q.dtype == torch.float32 else 32  # with 64, registers spill on some GPU
    divisor, widths = tile_divisor(q.dtype, d), (d, *head_parts(d))
    stats = None if dk is None else q.new_empty(4, count, dtype=torch.float32)
    shared = (q, *strides(q), do, *strides(do), k, *strides(k), v, *strides(v), index)
    programs_of_rows = batch * kv_heads * cdiv(rows, block)
    dq_norm = None if q_norm is None or dq is None else torch.empty_like(q_norm)
    shares = None
    if dq_norm is not None:
        shares = dq_norm.new_empty(programs_of_rows, d, dtype=torch.float32)
    media_query_gradient_kernel(
        lambda blocks: (programs_of_rows,),
        *shared, q_norm, stats, dq, *strides(dq), shares,
        kv_heads, group, queries, rows, media, tokens_per_media, count, scale, eps,
        attend, unattended, *widths, block, divisor, precision(q.dtype),
    )  # fmt: skip
    sum_shares(shares, dq_norm)
    if dk is None or dv is None:
        return dq_norm
    reach = torch.empty(batch, media, 2, dtype=torch.int32, device=q.device)
    media_reach_kernel(
        lambda blocks: (batch * media,),
        index, reach, queries, media, attend, unattended,
        min(1024, next_power_of_2(queries)),
    )  # fmt: skip

    def programs(blocks: dict[str, int]) -> tuple[int, ...]:
        tile = max(16, blocks["BLOCK_N"] // divisor)
        return (batch * kv_heads * media * cdiv(tokens_per_media, tile),)

    media_key_gradient_kernel(
        programs,
        *shared, reach, q_norm, stats, dk, *strides(dk), dv, *strides(dv),
        kv_heads, group, queries, media, tokens_per_media, count, scale, eps, attend, unattended,
        *widths, block, divisor, precision(q.dtype),
    )  # fmt: skip
    return dq_norm
