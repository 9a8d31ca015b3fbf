"""The backward of few-query attention: no atomics, every gradient element summed in one order.

Nothing of the forward is kept but its inputs. A first pass over the keys, which the second then
finds in L2, gives a row's largest score, its sum of exponentials, and the mean of dp that the
softmax takes off, in fp32 as dp at the largest score and what the mean is beyond it. So ``dp -
mean`` is exactly 0 where one key has all the weight or all keys have one dp, and elsewhere has the
rounding of the differences of dp and not, as ``sum(do * o)``, that of dp itself.

Where all rows of a key head fit in one tile, and there are key heads enough, that kernel gives
every gradient. Else it gives dq, a program per tile of rows, and a second one dk and dv, a program
per tile of keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._attention_tiles import (
    SIZES,
    as_bytes,
    dropout_factor,
    head_parts,
    inner_product,
    load_parts,
    mean_step,
    probabilities_and_score_gradients,
    row_block,
    score_strides,
    score_tile,
    shrink,
    store_parts,
    strides,
)
from ._dropout import threshold
from ._launcher import Config, kernel, precision
from ._triton import tl, triton

ENOUGH_HEADS = 64  # key heads of all images, to have a program each


@triton.jit
def _load_rows(
    row, rows, image, kv_head, kv_heads, group, queries,
    q_ptr, q_batch, q_head, q_query, do_ptr, do_batch, do_head, do_query,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """A tile of rows: where they are, q and do."""
    inside = row < rows
    head, query = kv_head * group + row // queries, (row % queries).to(tl.int64)
    place = image * kv_heads * group + head
    q1, q2 = load_parts(
        q_ptr + image * q_batch, head * q_head + query * q_query, inside, d, D1, D2
    )  # fmt: skip
    do1, do2 = load_parts(
        do_ptr + image * do_batch, head * do_head + query * do_query, inside, d, D1, D2
    )
    return inside, head, query, place, q1, q2, do1, do2


@triton.jit
def _scores_and_their_dp(
    k1, k2, v1, v2, n, inside_keys, first, image,
    inside, head, query, place, q1, q2, do1, do2,
    bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
    seed_ptr, drop_below, survivor_scale, scale,
    D2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile ``[keys, rows]`` of scores, of dp before the softmax, and the factor of dropout."""
    s, seen = score_tile(
        inner_product(k1, k2, q1, q2, D2, PRECISION),
        n, inside_keys, first, image, head, query, inside,
        bias_ptr, bias_batch, bias_head, bias_query, bias_key,
        mask_ptr, mask_batch, mask_key, scale,
    )  # fmt: skip
    dp = inner_product(v1, v2, do1, do2, D2, PRECISION)
    factor = 1.0
    if seed_ptr is not None:
        factor = dropout_factor(seed_ptr, drop_below, survivor_scale, first + n, query, place)
        dp *= factor
    return s, seen, dp, factor


@triton.jit
def _summed_over_keys(
    largest, total, pivot, beyond, lost_total, lost_beyond,
    k_ptr, k_key, v_ptr, v_key, keys, first, image, inside, head, query, place, q1, q2, do1, do2,
    bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
    seed_ptr, drop_below, survivor_scale, scale,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The first pass over one source: see `mean_step`."""
    for at in range(0, keys, TILE):
        n = at + tl.arange(0, TILE)
        inside_keys = n < keys
        k1, k2 = load_parts(k_ptr, n.to(tl.int64) * k_key, inside_keys, d, D1, D2)
        v1, v2 = load_parts(v_ptr, n.to(tl.int64) * v_key, inside_keys, d, D1, D2)
        s, _, dp, _ = _scores_and_their_dp(
            k1, k2, v1, v2, n, inside_keys, first, image,
            inside, head, query, place, q1, q2, do1, do2,
            bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
            seed_ptr, drop_below, survivor_scale, scale, D2, PRECISION,
        )  # fmt: skip
        largest, total, pivot, beyond, lost_total, lost_beyond = mean_step(
            s, dp, largest, total, pivot, beyond, lost_total, lost_beyond, q1.dtype, 0
        )
    return largest, total, pivot, beyond, lost_total, lost_beyond


@triton.jit
def _over_keys(
    dq1, dq2, k_ptr, k_key, v_ptr, v_key, dk_ptr, dk_key, dv_ptr, dv_key, keys, first, image,
    inside, head, query, place, q1, q2, do1, do2, largest, inverse, pivot, delta,
    bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
    seed_ptr, drop_below, survivor_scale, scale,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, TILE: tl.constexpr,
    WANT_Q: tl.constexpr, WANT_KV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for at in range(0, keys, TILE):
        n = at + tl.arange(0, TILE)
        inside_keys = n < keys
        key = n.to(tl.int64)
        k1, k2 = load_parts(k_ptr, key * k_key, inside_keys, d, D1, D2)
        v1, v2 = load_parts(v_ptr, key * v_key, inside_keys, d, D1, D2)
        s, seen, dp, factor = _scores_and_their_dp(
            k1, k2, v1, v2, n, inside_keys, first, image,
            inside, head, query, place, q1, q2, do1, do2,
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


@kernel(Config({"BLOCK_N": 64}, num_warps=8, num_stages=1))  # others spill somewhere
@triton.jit(do_not_specialize=[*SIZES, "keys2"])
def cross_attention_backward_kernel(
    q_ptr, q_batch, q_head, q_query,  # (batch, heads, queries, d)
    do_ptr, do_batch, do_head, do_query,
    stats_ptr,  # (4, count) fp32: largest score, 1 / sum of them, the mean of dp; or None
    k_ptr, k_batch, k_head, k_key, v_ptr, v_batch, v_head, v_key,  # (batch, kv_heads, keys, d)
    k2_ptr, k2_batch, k2_head, k2_key, v2_ptr, v2_batch, v2_head, v2_key,  # or None
    bias_ptr, bias_batch, bias_head, bias_query, bias_key,
    mask_ptr, mask_batch, mask_key,  # (batch, keys + keys2) bytes
    seed_ptr, drop_below, survivor_scale,
    dq_ptr, dq_batch, dq_head, dq_query,  # or None
    dk_ptr, dk_batch, dk_head, dk_key, dv_ptr, dv_batch, dv_head, dv_key,  # where one tile is all
    dk2_ptr, dk2_batch, dk2_head, dk2_key, dv2_ptr, dv2_batch, dv2_head, dv2_key,
    kv_heads, group, queries, rows, keys, keys2, count, scale,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    SHRINK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = BLOCK_N // SHRINK if BLOCK_N // SHRINK > 16 else 16
    program = tl.program_id(0)
    tiles = tl.cdiv(rows, BLOCK_M)
    kv_head = (program // tiles % kv_heads).to(tl.int64)
    image = (program // tiles // kv_heads).to(tl.int64)
    row = ((program % tiles).to(tl.int64) * BLOCK_M).to(tl.int32) + tl.arange(0, BLOCK_M)
    inside, head, query, place, q1, q2, do1, do2 = _load_rows(
        row, rows, image, kv_head, kv_heads, group, queries,
        q_ptr, q_batch, q_head, q_query, do_ptr, do_batch, do_head, do_query, d, D1, D2,
    )  # fmt: skip
    k_ptr += image * k_batch + kv_head * k_head
    v_ptr += image * v_batch + kv_head * v_head
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    pivot = tl.zeros([BLOCK_M], tl.float32)
    beyond = tl.zeros([BLOCK_M], tl.float32)
    lost_total, lost_beyond = total, beyond
    largest, total, pivot, beyond, lost_total, lost_beyond = _summed_over_keys(
        largest, total, pivot, beyond, lost_total, lost_beyond,
        k_ptr, k_key, v_ptr, v_key, keys, 0, image, inside, head, query, place, q1, q2, do1, do2,
        bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
        seed_ptr, drop_below, survivor_scale, scale, d, D1, D2, TILE, PRECISION,
    )  # fmt: skip
    if k2_ptr is not None:
        k2_ptr += image * k2_batch + kv_head * k2_head
        v2_ptr += image * v2_batch + kv_head * v2_head
        largest, total, pivot, beyond, lost_total, lost_beyond = _summed_over_keys(
            largest, total, pivot, beyond, lost_total, lost_beyond,
            k2_ptr, k2_key, v2_ptr, v2_key, keys2, keys, image,
            inside, head, query, place, q1, q2, do1, do2,
            bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
            seed_ptr, drop_below, survivor_scale, scale, d, D1, D2, TILE, PRECISION,
        )  # fmt: skip
    largest = tl.where(total == 0.0, 0.0, largest)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    delta = beyond * inverse
    if q1.dtype != tl.float32:  # whose ds is rounded to 16 bits: one number, and fewer registers
        delta += pivot
    if stats_ptr is not None:
        at = stats_ptr + place * queries + query
        tl.store(at, largest, mask=inside)
        tl.store(at + count, inverse, mask=inside)
        tl.store(at + count + count, delta, mask=inside)
        if q1.dtype == tl.float32:
            tl.store(at + count + count + count, pivot, mask=inside)
    dq1 = tl.zeros([D1, BLOCK_M], tl.float32)
    dq2 = tl.zeros([D2 if D2 > 0 else 16, BLOCK_M], tl.float32)
    dq1, dq2 = _over_keys(
        dq1, dq2,
        k_ptr, k_key, v_ptr, v_key,
        None if dk_ptr is None else dk_ptr + image * dk_batch + kv_head * dk_head, dk_key,
        None if dv_ptr is None else dv_ptr + image * dv_batch + kv_head * dv_head, dv_key,
        keys, 0, image,
        inside, head, query, place, q1, q2, do1, do2, largest, inverse, pivot, delta,
        bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
        seed_ptr, drop_below, survivor_scale, scale, d, D1, D2, TILE,
        dq_ptr is not None, dk_ptr is not None, PRECISION,
    )  # fmt: skip
    if k2_ptr is not None:
        dq1, dq2 = _over_keys(
            dq1, dq2,
            k2_ptr, k2_key, v2_ptr, v2_key,
            None if dk2_ptr is None else dk2_ptr + image * dk2_batch + kv_head * dk2_head, dk2_key,
            None if dv2_ptr is None else dv2_ptr + image * dv2_batch + kv_head * dv2_head, dv2_key,
            keys2, keys, image,
            inside, head, query, place, q1, q2, do1, do2, largest, inverse, pivot, delta,
            bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
            seed_ptr, drop_below, survivor_scale, scale, d, D1, D2, TILE,
            dq_ptr is not None, dk2_ptr is not None, PRECISION,
        )  # fmt: skip
    if dq_ptr is not None:
        at = image * dq_batch + head * dq_head + query * dq_query
        dq1, dq2 = tl.trans(dq1) * scale, tl.trans(dq2) * scale
        store_parts(dq_ptr, at, inside, dq1, dq2, d, D1, D2)


# On an H200 the second config takes 195 us instead of 227 for heads of 128 features, 322 instead of
# 282 for heads of 96, and longer for all narrower ones.
@kernel(
    Config({"BLOCK_N": 32}, num_warps=4, num_stages=2),
    Config({"BLOCK_N": 64}, num_warps=4, num_stages=2),
    choose=lambda d: int(d > 96),
)
@triton.jit(do_not_specialize=[*SIZES, "first"])
def key_gradient_kernel(
    q_ptr, q_batch, q_head, q_query,  # (batch, heads, queries, d)
    do_ptr, do_batch, do_head, do_query,
    stats_ptr,  # (4, count) fp32: as the kernel above leaves it
    k_ptr, k_batch, k_head, k_key, v_ptr, v_batch, v_head, v_key,  # (batch, kv_heads, keys, d)
    bias_ptr, bias_batch, bias_head, bias_query, bias_key,
    mask_ptr, mask_batch, mask_key,  # (batch, keys of all sources) bytes
    seed_ptr, drop_below, survivor_scale,
    dk_ptr, dk_batch, dk_head, dk_key, dv_ptr, dv_batch, dv_head, dv_key,
    kv_heads, group, queries, rows, keys, first, count, scale,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    SHRINK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = BLOCK_N // SHRINK if BLOCK_N // SHRINK > 16 else 16
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
        inside, head, query, place, q1, q2, do1, do2 = _load_rows(
            row, rows, image, kv_head, kv_heads, group, queries,
            q_ptr, q_batch, q_head, q_query, do_ptr, do_batch, do_head, do_query, d, D1, D2,
        )  # fmt: skip
        at = stats_ptr + place * queries + query
        largest = tl.load(at, mask=inside, other=0.0)
        inverse = tl.load(at + count, mask=inside, other=0.0)
        delta = tl.load(at + count + count, mask=inside, other=0.0)
        pivot = delta
        if q1.dtype == tl.float32:
            pivot = tl.load(at + count + count + count, mask=inside, other=0.0)
        s, seen, dp, factor = _scores_and_their_dp(
            k1, k2, v1, v2, n, inside_keys, first, image,
            inside, head, query, place, q1, q2, do1, do2,
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


def launch_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, k2: Tensor | None, v2: Tensor | None,
    bias: Tensor | None, key_mask: Tensor | None, seed: Tensor | None,
    scale: float, dropout: float,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None,
    dk2: Tensor | None, dv2: Tensor | None,
) -> None:  # fmt: skip
    """Fill the gradients that are not None; see `attention_backward`."""
    batch, heads, queries, d = q.shape
    kv_heads, keys = k.shape[1:3]
    keys2 = 0 if k2 is None else k2.shape[2]
    rows, count = heads // kv_heads * queries, batch * heads * queries
    block = row_block(q, rows)
    row_tiles = triton.cdiv(rows, block)
    one_pass = row_tiles == 1 and batch * kv_heads >= ENOUGH_HEADS
    written = (dk, dv, dk2, dv2) if one_pass else (None,) * 4
    stats = None if one_pass else q.new_empty(4, count, dtype=torch.float32)
    shared = (q, *strides(q), do, *strides(do), stats)
    masks = (
        bias, *score_strides(bias, (batch, heads, queries, keys + keys2)),
        as_bytes(key_mask), *strides(key_mask, 2),
        seed if dropout > 0 else None, threshold(dropout), 1 / (1 - dropout),
    )  # fmt: skip
    shrunk, widths = shrink(q), (d, *head_parts(d))
    cross_attention_backward_kernel(
        lambda blocks: (batch * kv_heads * row_tiles,),
        *shared, k, *strides(k), v, *strides(v), k2, *strides(k2), v2, *strides(v2), *masks,
        dq, *strides(dq), *(a for g in written for a in (g, *strides(g))),
        kv_heads, heads // kv_heads, queries, rows, keys, keys2, count, scale,
        *widths, block, shrunk * (2 if d > 96 else 1), precision(),  # else, on sm_100, 4 spill
    )  # fmt: skip
    if one_pass:
        return
    for first, x, y, dx, dy in ((0, k, v, dk, dv), (keys, k2, v2, dk2, dv2)):
        if x is not None and dx is not None:
            key_gradient_kernel(
                _by_keys(x, shrunk),
                *shared, x, *strides(x), y, *strides(y), *masks,
                dx, *strides(dx), dy, *strides(dy),
                kv_heads, heads // kv_heads, queries, rows, x.shape[2], first, count, scale,
                *widths, row_block(q, rows) if d <= 64 else 16, shrunk, precision(),
                size=d,
            )  # fmt: skip


def _by_keys(k: Tensor, shrunk: int) -> Callable[[dict[str, int]], tuple[int, ...]]:
    batch, kv_heads, keys = k.shape[:3]
    return lambda blocks: (
        batch * kv_heads * triton.cdiv(keys, max(16, blocks["BLOCK_N"] // shrunk)),
    )
