"""Backward of `cross_attention` in fp32, deterministic: no atomics, each sum has one fixed order.

The forward keeps its inputs only: over thousands of keys ``sum(do * o)`` would not be exact enough.
`cross_attention_backward_kernel` has one program per tile of rows. Its first pass over the keys
computes the largest score, the sum of exponentials and the mean of dp, which the gradient of the
softmax subtracts; its second pass finds the keys in L2. If all rows of a key head fit in one tile
and there are enough key heads, this kernel computes every gradient. Otherwise it computes dq, and
`key_gradient_kernel`, one program per tile of keys, computes dk and dv.

The mean is kept as ``pivot``, dp at the largest score, plus a difference. ``dp - mean`` is then
exactly 0 where one key has all the weight or all keys have the same dp, and elsewhere it is as
exact as the differences of dp. The usual ``sum(do * o)`` has the rounding error of dp itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._attention_arguments import ABSENT, Masks, Strided, mask_arguments
from ._attention_tiles import (
    SIZES,
    dot_parts,
    dropout_factor,
    load_parts,
    mean_step,
    probabilities_and_score_gradients,
    score_tile,
    store_parts,
)
from ._attention_tilings import head_parts, row_block, tile_divisor
from ._launcher import Config, kernel, precision
from ._sizes import cdiv
from ._triton import tl, triton

# Key heads of all images. With fewer, one program per key head would leave much of a GPU idle.
ENOUGH_HEADS = 64


@triton.jit
def _load_rows(
    row, rows, image, kv_head, kv_heads, group, queries,
    q_ptr, q_batch, q_head, q_query, do_ptr, do_batch, do_head, do_query,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """Load q and do of a tile of rows; return their positions too."""
    inside = row < rows
    head, query = kv_head * group + row // queries, (row % queries).to(tl.int64)
    batch_head = image * kv_heads * group + head
    q1, q2 = load_parts(
        q_ptr + image * q_batch, head * q_head + query * q_query, inside, d, D1, D2
    )  # fmt: skip
    do1, do2 = load_parts(
        do_ptr + image * do_batch, head * do_head + query * do_query, inside, d, D1, D2
    )
    return inside, head, query, batch_head, q1, q2, do1, do2


@triton.jit
def _scores_and_dp(
    k1, k2, v1, v2, n, inside_keys, first, image,
    inside, head, query, batch_head, q1, q2, do1, do2,
    bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
    seed_ptr, drop_below, survivor_scale, scale,
    D2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile ``[keys, rows]`` of scores and of dp, their softmax's gradient; dropout's factor."""
    s, seen = score_tile(
        dot_parts(k1, k2, q1, q2, D2, PRECISION),
        n, inside_keys, first, image, head, query, inside,
        bias_ptr, bias_batch, bias_head, bias_query, bias_key,
        mask_ptr, mask_batch, mask_key, scale, 1.0,
    )  # fmt: skip
    dp = dot_parts(v1, v2, do1, do2, D2, PRECISION)
    factor = 1.0
    if seed_ptr is not None:
        factor = dropout_factor(
            seed_ptr, drop_below, survivor_scale, first + n, query, batch_head, 0
        )
        dp *= factor
    return s, seen, dp, factor


@triton.jit
def _softmax_statistics(
    largest, total, pivot, excess, total_error, excess_error,
    k_ptr, k_key, v_ptr, v_key, keys, first, image,
    inside, head, query, batch_head, q1, q2, do1, do2,
    bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
    seed_ptr, drop_below, survivor_scale, scale,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The first pass over the keys of one source: see `mean_step`."""
    for at in range(0, keys, TILE):
        n = at + tl.arange(0, TILE)
        inside_keys = n < keys
        k1, k2 = load_parts(k_ptr, n.to(tl.int64) * k_key, inside_keys, d, D1, D2)
        v1, v2 = load_parts(v_ptr, n.to(tl.int64) * v_key, inside_keys, d, D1, D2)
        s, _, dp, _ = _scores_and_dp(
            k1, k2, v1, v2, n, inside_keys, first, image,
            inside, head, query, batch_head, q1, q2, do1, do2,
            bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
            seed_ptr, drop_below, survivor_scale, scale, D2, PRECISION,
        )  # fmt: skip
        largest, total, pivot, excess, total_error, excess_error = mean_step(
            s, dp, largest, total, pivot, excess, total_error, excess_error, q1.dtype, 0
        )
    return largest, total, pivot, excess, total_error, excess_error


@triton.jit
def _key_gradients_and_dq(
    dq1, dq2, k_ptr, k_key, v_ptr, v_key, dk_ptr, dk_key, dv_ptr, dv_key, keys, first, image,
    inside, head, query, batch_head, q1, q2, do1, do2, largest, inverse, pivot, delta,
    bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
    seed_ptr, drop_below, survivor_scale, scale,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, TILE: tl.constexpr,
    WANT_Q: tl.constexpr, WANT_KV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The second pass over the keys of one source: add to dq, and store dk and dv if wanted."""
    for at in range(0, keys, TILE):
        n = at + tl.arange(0, TILE)
        inside_keys = n < keys
        key = n.to(tl.int64)
        k1, k2 = load_parts(k_ptr, key * k_key, inside_keys, d, D1, D2)
        v1, v2 = load_parts(v_ptr, key * v_key, inside_keys, d, D1, D2)
        s, seen, dp, factor = _scores_and_dp(
            k1, k2, v1, v2, n, inside_keys, first, image,
            inside, head, query, batch_head, q1, q2, do1, do2,
            bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
            seed_ptr, drop_below, survivor_scale, scale, D2, PRECISION,
        )  # fmt: skip
        p, ds = probabilities_and_score_gradients(
            s, seen[:, None], inside, dp, factor, largest, inverse, pivot, delta, q1.dtype, 0
        )
        if WANT_KV:
            dv1 = tl.dot(p, do1, input_precision=PRECISION)
            dv2 = tl.dot(p, do2, input_precision=PRECISION) if D2 > 0 else dv1
            store_parts(dv_ptr, key * dv_key, inside_keys, dv1, dv2, d, D1, D2)
            dk1 = tl.dot(ds, q1, input_precision=PRECISION) * scale
            dk2 = tl.dot(ds, q2, input_precision=PRECISION) * scale if D2 > 0 else dk1
            store_parts(dk_ptr, key * dk_key, inside_keys, dk1, dk2, d, D1, D2)
        if WANT_Q:
            dq1 = tl.dot(tl.trans(k1), ds, dq1, input_precision=PRECISION)
            if D2 > 0:
                dq2 = tl.dot(tl.trans(k2), ds, dq2, input_precision=PRECISION)
    return dq1, dq2


@kernel(Config({"BLOCK_N": 64}, num_warps=8, num_stages=1))  # other configs spill on some GPU
@triton.jit(do_not_specialize=[*SIZES, "keys2"])
def cross_attention_backward_kernel(
    q_ptr, q_batch, q_head, q_query,  # (batch, heads, queries, d)
    do_ptr, do_batch, do_head, do_query,
    stats_ptr,  # (4, count) fp32 or None: largest score, 1 / sum of exponentials, delta, pivot
    k_ptr, k_batch, k_head, k_key, v_ptr, v_batch, v_head, v_key,  # (batch, kv_heads, keys, d)
    k2_ptr, k2_batch, k2_head, k2_key, v2_ptr, v2_batch, v2_head, v2_key,  # or None
    bias_ptr, bias_batch, bias_head, bias_query, bias_key,
    mask_ptr, mask_batch, mask_key,  # (batch, keys + keys2) bytes
    seed_ptr, drop_below, survivor_scale,
    dq_ptr, dq_batch, dq_head, dq_query,  # or None
    dk_ptr, dk_batch, dk_head, dk_key, dv_ptr, dv_batch, dv_head, dv_key,  # None if several tiles
    dk2_ptr, dk2_batch, dk2_head, dk2_key, dv2_ptr, dv2_batch, dv2_head, dv2_key,
    kv_heads, group, queries, rows, keys, keys2, count, scale,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    TILE_DIVISOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = BLOCK_N // TILE_DIVISOR if BLOCK_N // TILE_DIVISOR > 16 else 16
    program = tl.program_id(0)
    tiles = tl.cdiv(rows, BLOCK_M)
    kv_head = (program // tiles % kv_heads).to(tl.int64)
    image = (program // tiles // kv_heads).to(tl.int64)
    row = ((program % tiles).to(tl.int64) * BLOCK_M).to(tl.int32) + tl.arange(0, BLOCK_M)
    inside, head, query, batch_head, q1, q2, do1, do2 = _load_rows(
        row, rows, image, kv_head, kv_heads, group, queries,
        q_ptr, q_batch, q_head, q_query, do_ptr, do_batch, do_head, do_query, d, D1, D2,
    )  # fmt: skip
    k_ptr += image * k_batch + kv_head * k_head
    v_ptr += image * v_batch + kv_head * v_head
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    pivot = tl.zeros([BLOCK_M], tl.float32)
    excess = tl.zeros([BLOCK_M], tl.float32)
    total_error, excess_error = total, excess
    largest, total, pivot, excess, total_error, excess_error = _softmax_statistics(
        largest, total, pivot, excess, total_error, excess_error,
        k_ptr, k_key, v_ptr, v_key, keys, 0, image,
        inside, head, query, batch_head, q1, q2, do1, do2,
        bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
        seed_ptr, drop_below, survivor_scale, scale, d, D1, D2, TILE, PRECISION,
    )  # fmt: skip
    if k2_ptr is not None:
        k2_ptr += image * k2_batch + kv_head * k2_head
        v2_ptr += image * v2_batch + kv_head * v2_head
        largest, total, pivot, excess, total_error, excess_error = _softmax_statistics(
            largest, total, pivot, excess, total_error, excess_error,
            k2_ptr, k2_key, v2_ptr, v2_key, keys2, keys, image,
            inside, head, query, batch_head, q1, q2, do1, do2,
            bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
            seed_ptr, drop_below, survivor_scale, scale, d, D1, D2, TILE, PRECISION,
        )  # fmt: skip
    largest = tl.where(total == 0.0, 0.0, largest)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    delta = excess * inverse
    if stats_ptr is not None:
        at = stats_ptr + batch_head * queries + query
        tl.store(at, largest, mask=inside)
        tl.store(at + count, inverse, mask=inside)
        tl.store(at + count + count, delta, mask=inside)
        tl.store(at + count + count + count, pivot, mask=inside)
    dq1 = tl.zeros([D1, BLOCK_M], tl.float32)
    dq2 = tl.zeros([D2 if D2 > 0 else 16, BLOCK_M], tl.float32)
    dq1, dq2 = _key_gradients_and_dq(
        dq1, dq2,
        k_ptr, k_key, v_ptr, v_key,
        None if dk_ptr is None else dk_ptr + image * dk_batch + kv_head * dk_head, dk_key,
        None if dv_ptr is None else dv_ptr + image * dv_batch + kv_head * dv_head, dv_key,
        keys, 0, image,
        inside, head, query, batch_head, q1, q2, do1, do2, largest, inverse, pivot, delta,
        bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
        seed_ptr, drop_below, survivor_scale, scale, d, D1, D2, TILE,
        dq_ptr is not None, dk_ptr is not None, PRECISION,
    )  # fmt: skip
    if k2_ptr is not None:
        dq1, dq2 = _key_gradients_and_dq(
            dq1, dq2,
            k2_ptr, k2_key, v2_ptr, v2_key,
            None if dk2_ptr is None else dk2_ptr + image * dk2_batch + kv_head * dk2_head, dk2_key,
            None if dv2_ptr is None else dv2_ptr + image * dv2_batch + kv_head * dv2_head, dv2_key,
            keys2, keys, image,
            inside, head, query, batch_head, q1, q2, do1, do2, largest, inverse, pivot, delta,
            bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
            seed_ptr, drop_below, survivor_scale, scale, d, D1, D2, TILE,
            dq_ptr is not None, dk2_ptr is not None, PRECISION,
        )  # fmt: skip
    if dq_ptr is not None:
        at = image * dq_batch + head * dq_head + query * dq_query
        dq1, dq2 = tl.trans(dq1) * scale, tl.trans(dq2) * scale
        store_parts(dq_ptr, at, inside, dq1, dq2, d, D1, D2)


@kernel(Config({"BLOCK_N": 32}, num_warps=4, num_stages=2))
@triton.jit(do_not_specialize=[*SIZES, "first"])
def key_gradient_kernel(
    q_ptr, q_batch, q_head, q_query,  # (batch, heads, queries, d)
    do_ptr, do_batch, do_head, do_query,
    stats_ptr,  # (4, count) fp32, written by cross_attention_backward_kernel
    k_ptr, k_batch, k_head, k_key, v_ptr, v_batch, v_head, v_key,  # (batch, kv_heads, keys, d)
    bias_ptr, bias_batch, bias_head, bias_query, bias_key,
    mask_ptr, mask_batch, mask_key,  # (batch, keys of all sources) bytes
    seed_ptr, drop_below, survivor_scale,
    dk_ptr, dk_batch, dk_head, dk_key, dv_ptr, dv_batch, dv_head, dv_key,
    kv_heads, group, queries, rows, keys, first, count, scale,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    TILE_DIVISOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = BLOCK_N // TILE_DIVISOR if BLOCK_N // TILE_DIVISOR > 16 else 16
    program = tl.program_id(0)
    tiles = tl.cdiv(keys, TILE)
    kv_head = (program // tiles % kv_heads).to(tl.int64)
    image = (program // tiles // kv_heads).to(tl.int64)
    n = ((program % tiles).to(tl.int64) * TILE).to(tl.int32) + tl.arange(0, TILE)
    inside_keys = n < keys
    key = n.to(tl.int64)
    k_ptr += image * k_batch + kv_head * k_head
    v_ptr += image * v_batch + kv_head * v_head
    k1, k2 = load_parts(k_ptr, key * k_key, inside_keys, d, D1, D2)
    v1, v2 = load_parts(v_ptr, key * v_key, inside_keys, d, D1, D2)
    dk1 = tl.zeros([TILE, D1], tl.float32)
    dv1 = tl.zeros([TILE, D1], tl.float32)
    dk2 = tl.zeros([TILE, D2 if D2 > 0 else 16], tl.float32)
    dv2 = tl.zeros([TILE, D2 if D2 > 0 else 16], tl.float32)
    for start in range(0, rows, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside, head, query, batch_head, q1, q2, do1, do2 = _load_rows(
            row, rows, image, kv_head, kv_heads, group, queries,
            q_ptr, q_batch, q_head, q_query, do_ptr, do_batch, do_head, do_query, d, D1, D2,
        )  # fmt: skip
        at = stats_ptr + batch_head * queries + query
        largest = tl.load(at, mask=inside, other=0.0)
        inverse = tl.load(at + count, mask=inside, other=0.0)
        delta = tl.load(at + count + count, mask=inside, other=0.0)
        pivot = tl.load(at + count + count + count, mask=inside, other=0.0)
        s, seen, dp, factor = _scores_and_dp(
            k1, k2, v1, v2, n, inside_keys, first, image,
            inside, head, query, batch_head, q1, q2, do1, do2,
            bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
            seed_ptr, drop_below, survivor_scale, scale, D2, PRECISION,
        )  # fmt: skip
        p, ds = probabilities_and_score_gradients(
            s, seen[:, None], inside, dp, factor, largest, inverse, pivot, delta, q1.dtype, 0
        )
        dv1 = tl.dot(p, do1, dv1, input_precision=PRECISION)
        dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
        if D2 > 0:
            dv2 = tl.dot(p, do2, dv2, input_precision=PRECISION)
            dk2 = tl.dot(ds, q2, dk2, input_precision=PRECISION)
    dk_ptr += image * dk_batch + kv_head * dk_head
    dv_ptr += image * dv_batch + kv_head * dv_head
    store_parts(dv_ptr, key * dv_key, inside_keys, dv1, dv2, d, D1, D2)
    store_parts(dk_ptr, key * dk_key, inside_keys, dk1 * scale, dk2 * scale, d, D1, D2)


def launch_backward_fp32(
    sizes: Sequence[int],
    do: Strided,
    sources: Sequence[Strided],
    masks: Masks,
    scale: float,
    dropout: float,
    targets: Sequence[Strided],
) -> None:
    """Fill those of the targets dq, dk, dv, dk2 and dv2 that are there.

    sizes: see `call_sizes`. sources: q, k, v, k2, v2. See `attention_backward`.
    """
    q, k, v, k2, v2 = sources
    dq, dk, dv, dk2, dv2 = targets
    batch, heads, kv_heads, queries, keys, keys2, d = sizes
    like: Tensor = q[0]  # type: ignore[assignment]
    rows, count = heads // kv_heads * queries, batch * heads * queries
    block = row_block(like, rows)
    row_tiles = cdiv(rows, block)
    one_pass = row_tiles == 1 and batch * kv_heads >= ENOUGH_HEADS
    written = (*dk, *dv, *dk2, *dv2) if one_pass else ABSENT * 4
    stats = None if one_pass else like.new_empty(4, count, dtype=torch.float32)
    scored = mask_arguments(masks, dropout, (batch, heads, queries, keys + keys2))
    divisor, widths = tile_divisor(like.dtype, d), (d, *head_parts(d))
    cross_attention_backward_kernel(
        lambda blocks: (batch * kv_heads * row_tiles,),
        *q, *do, stats, *k, *v, *k2, *v2, *scored, *dq, *written,
        kv_heads, heads // kv_heads, queries, rows, keys, keys2, count, scale,
        *widths, block, divisor, precision(like.dtype),
    )  # fmt: skip
    if one_pass:
        return
    for first, tokens, x, y, dx, dy in ((0, keys, k, v, dk, dv), (keys, keys2, k2, v2, dk2, dv2)):
        if x[0] is not None and dx[0] is not None:
            key_gradient_kernel(
                _by_keys(batch * kv_heads, tokens, divisor),
                *q, *do, stats, *x, *y, *scored, *dx, *dy,
                kv_heads, heads // kv_heads, queries, rows, tokens, first, count, scale,
                *widths, block, divisor, precision(like.dtype),
            )  # fmt: skip


def _by_keys(heads: int, keys: int, divisor: int) -> Callable[[dict[str, int]], tuple[int, ...]]:
    """The grid of `key_gradient_kernel`: one program per tile of keys of each head and image."""
    return lambda blocks: (heads * cdiv(keys, max(16, blocks["BLOCK_N"] // divisor)),)
