"""Attention of few queries to many keys, from one source or two, with an online softmax.

A program takes a tile of rows (the queries of all heads that share a key head, of one image) and a
share of the keys. If the keys are split, a second kernel combines the partial results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _cross_attention_aten as aten
from ._attention_arguments import (
    NOTHING_KEPT,
    Kept,
    Masks,
    Strided,
    by_strides,
    call_sizes,
    kept_by_strides,
    mask_arguments,
    new_kept,
)
from ._attention_shares import combine_splits_kernel, key_splits, log_sum_exp
from ._attention_tiles import (
    LOG2_E,
    SIZES,
    dot_parts,
    dropout_factor,
    load_parts,
    score_tile,
    softmax_step,
    store_parts,
)
from ._attention_tilings import head_parts, row_block, tile_divisor
from ._cross_attention_backward import launch_backward
from ._launcher import Config, capability, dense, is_traced, kernel, precision, runs_triton
from ._sizes import cdiv, next_power_of_2
from ._triton import tl, triton


@triton.jit
def _attend(
    largest, total, acc1, acc2, q1, q2,
    k_ptr, k_key, v_ptr, v_key, start, end, keys, first,
    image, head, query, batch_head, inside_rows,
    bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
    seed_ptr, drop_below, scale,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys ``start`` to ``end`` of one source.

    ``first`` is the number of the source's first key among the keys of all sources.
    """
    for at in range(start, end, TILE):
        n = at + tl.arange(0, TILE)
        inside = n < keys
        k1, k2 = load_parts(k_ptr, n.to(tl.int64) * k_key, inside, d, D1, D2)
        v1, v2 = load_parts(v_ptr, n.to(tl.int64) * v_key, inside, d, D1, D2)
        s, _ = score_tile(
            dot_parts(k1, k2, q1, q2, D2, PRECISION),
            n, inside, first, image, head, query, inside_rows,
            bias_ptr, bias_batch, bias_head, bias_query, bias_key,
            mask_ptr, mask_batch, mask_key, scale * LOG2_E, LOG2_E,
        )  # fmt: skip
        p, rescale, largest, total = softmax_step(s, largest, total, v1.dtype, 0)
        if seed_ptr is not None:  # what is left is scaled at last, in fp32
            p *= dropout_factor(seed_ptr, drop_below, 1.0, first + n, query, batch_head, 0)
        p = p.to(v1.dtype)
        acc1 = tl.dot(tl.trans(v1), p, acc1 * rescale[None, :], input_precision=PRECISION)
        if D2 > 0:
            acc2 = tl.dot(tl.trans(v2), p, acc2 * rescale[None, :], input_precision=PRECISION)
    return largest, total, acc1, acc2


# With what is kept for backward the first spills before sm_90.
CONFIGS = [Config({"BLOCK_N": 64}, num_warps=4, num_stages=stages) for stages in (2, 3)]


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
    TILE_DIVISOR: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = BLOCK_N // TILE_DIVISOR if BLOCK_N // TILE_DIVISOR > 16 else 16
    program = tl.program_id(0)
    split, program = (program % splits).to(tl.int64), program // splits
    tiles = tl.cdiv(rows, BLOCK_M)
    row = ((program % tiles).to(tl.int64) * BLOCK_M).to(tl.int32) + tl.arange(0, BLOCK_M)
    kv_head = (program // tiles % kv_heads).to(tl.int64)
    image = (program // tiles // kv_heads).to(tl.int64)
    inside_rows = row < rows
    head, query = kv_head * group + row // queries, (row % queries).to(tl.int64)
    batch_head = image * kv_heads * group + head
    q_ptr += image * q_batch
    q1, q2 = load_parts(q_ptr, head * q_head + query * q_query, inside_rows, d, D1, D2)
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([D1, BLOCK_M], tl.float32)
    acc2 = tl.zeros([D2 if D2 > 0 else 16, BLOCK_M], tl.float32)
    # The tiles of both sources have consecutive numbers, which are divided among the splits.
    tiles1 = tl.cdiv(keys, TILE)
    share = tl.cdiv(tiles1 + tl.cdiv(keys2, TILE), splits)
    start, end = split * share * TILE, (split + 1) * share * TILE
    largest, total, acc1, acc2 = _attend(
        largest, total, acc1, acc2, q1, q2,
        k_ptr + image * k_batch + kv_head * k_head, k_key,
        v_ptr + image * v_batch + kv_head * v_head, v_key,
        tl.minimum(start, keys).to(tl.int32), tl.minimum(end, keys).to(tl.int32), keys, 0,
        image, head, query, batch_head, inside_rows,
        bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
        seed_ptr, drop_below, scale, d, D1, D2, TILE, PRECISION,
    )  # fmt: skip
    if k2_ptr is not None:
        start, end = start - tiles1.to(tl.int64) * TILE, end - tiles1.to(tl.int64) * TILE
        largest, total, acc1, acc2 = _attend(
            largest, total, acc1, acc2, q1, q2,
            k2_ptr + image * k2_batch + kv_head * k2_head, k2_key,
            v2_ptr + image * v2_batch + kv_head * v2_head, v2_key,
            tl.maximum(start, 0).to(tl.int32), tl.minimum(end, keys2).to(tl.int32), keys2, keys,
            image, head, query, batch_head, inside_rows,
            bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
            seed_ptr, drop_below, scale, d, D1, D2, TILE, PRECISION,
        )  # fmt: skip
    if seed_ptr is not None:
        acc1, acc2 = acc1 * survivor_scale, acc2 * survivor_scale
    if PARTIAL:
        at = batch_head * queries + query
        stats_ptr += split * 2 * count
        o_ptr += split * count * d
        tl.store(stats_ptr + at, largest, mask=inside_rows)
        tl.store(stats_ptr + count + at, total, mask=inside_rows)
        store_parts(o_ptr, at * d, inside_rows, tl.trans(acc1), tl.trans(acc2), d, D1, D2)
    else:
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)[None, :]  # all keys masked: zeros
        acc1, acc2 = acc1 * inverse, acc2 * inverse
        out_row = ((image * queries + query) * kv_heads * group + head) * d
        high1, high2 = acc1.to(q1.dtype), acc2.to(q1.dtype)
        store_parts(o_ptr, out_row, inside_rows, tl.trans(high1), tl.trans(high2), d, D1, D2)
        if lse_ptr is not None:
            lse = log_sum_exp(largest, total)
            tl.store(lse_ptr + batch_head * queries + query, lse, mask=inside_rows)
            low1 = (acc1 - high1.to(tl.float32)).to(q1.dtype)
            low2 = (acc2 - high2.to(tl.float32)).to(q1.dtype)
            store_parts(low_ptr, out_row, inside_rows, tl.trans(low1), tl.trans(low2), d, D1, D2)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor | None, v2: Tensor | None,
    bias: Tensor | None, key_mask: Tensor | None, seed: Tensor | None,
    *, scale: float, dropout: float, o: Tensor | None = None, keep: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return o ``(batch, heads, queries, d)``, in memory ``(batch, queries, heads, d)``.

    The arguments are those of the op `cross_attention`; ``o`` is a tensor to fill. Where Triton
    runs in 16 bits, ``keep`` also returns what `attention_backward` needs: ``lse (batch, heads,
    queries)`` in fp32, see `log_sum_exp`, and ``low``, what the rounding of o took off, as o.
    """
    q, k, v = dense(q), dense(k), dense(v)
    k2, v2 = k2 if k2 is None else dense(k2), v2 if v2 is None else dense(v2)
    empty = q.numel() == 0 or k.shape[2] + (0 if k2 is None else k2.shape[2]) == 0
    o = aten.by_tokens(q) if o is None else o
    lse = low = None
    if empty:
        o.zero_()
    elif runs_triton(q):
        if keep:
            lse, low = new_kept(o, q.shape[:3])
        sources, masks = [by_strides(x) for x in (q, k, v, k2, v2)], (bias, key_mask, seed)
        launch_forward(call_sizes(q, k, k2), sources, masks, scale, dropout, o, lse, low)
    elif not is_traced(q):
        aten.forward(q, k, v, k2, v2, bias, key_mask, seed, scale, dropout, o)
    return o, lse, low


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k2: Tensor | None,
    v2: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    *,
    scale: float,
    dropout: float,
    want_q: bool,
    want_kv: bool,
    want_kv2: bool,
    kept: Kept = NOTHING_KEPT,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v, k2 and v2, or None for those that are not wanted.

    Each is laid out in memory as ``(batch, tokens, heads, d)``. If ``into`` is given, the first
    three are written into its tensors, whose last stride must be 1, and those of k and v must have
    the same strides. kept: what `attention_forward` has returned.
    """
    do, q, k, v = dense(do), dense(q), dense(k), dense(v)
    k2, v2 = k2 if k2 is None else dense(k2), v2 if v2 is None else dense(v2)
    empty = q.numel() == 0 or k.shape[2] + (0 if k2 is None else k2.shape[2]) == 0
    if kept[1] is not None:  # one kernel yields the gradients of both sources
        want_kv = want_kv2 = want_kv or want_kv2
    targets = _targets(q, k, k2, want_q, want_kv, want_kv2, into)
    if empty:
        for target in targets:
            if target is not None:
                target.zero_()
    elif runs_triton(q):
        outer, *sources = [by_strides(x) for x in (do, q, k, v, k2, v2)]
        launch_backward(
            call_sizes(q, k, k2), outer, kept_by_strides(*kept), sources, (bias, key_mask, seed),
            scale, dropout, [by_strides(x) for x in targets],
        )  # fmt: skip
    elif not is_traced(q):
        aten.backward(do, q, k, v, k2, v2, bias, key_mask, seed, scale, dropout, *targets)
    return targets


def _targets(
    q: Tensor,
    k: Tensor,
    k2: Tensor | None,
    want_q: bool,
    want_kv: bool,
    want_kv2: bool,
    into: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor | None, ...]:
    """Allocate the tensors that `attention_backward` fills."""
    dq, dk, dv = into if into is not None else (None, None, None)
    dk2 = dv2 = None
    if into is None and want_q:
        dq = aten.by_tokens(q)
    if into is None and want_kv:
        dk, dv = (aten.by_tokens(k) for _ in range(2))
    if want_kv2 and k2 is not None:
        dk2, dv2 = (aten.by_tokens(k2) for _ in range(2))
    return dq if want_q else None, dk if want_kv else None, dv if want_kv else None, dk2, dv2


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
    rows, count = heads // kv_heads * queries, batch * heads * queries
    block = row_block(o, rows)
    programs = batch * kv_heads * cdiv(rows, block)
    splits = key_splits(programs, keys + keys2)
    out, stats = o, None
    if splits > 1:
        out = o.new_empty(splits, count, d, dtype=torch.float32)
        stats = o.new_empty(splits, 2, count, dtype=torch.float32)
    cross_attention_kernel(
        lambda blocks: (programs * splits,), *q, *k, *v, *k2, *v2,
        *mask_arguments(masks, dropout, (batch, heads, queries, keys + keys2)),
        out, stats, lse, low,
        kv_heads, heads // kv_heads, queries, rows, keys, keys2, count, splits, scale, d,
        *head_parts(d), block, tile_divisor(o.dtype, d), splits > 1, precision(o.dtype),
        config=int(lse is not None and d <= 64 and capability(o) < 90),
    )  # fmt: skip
    if splits > 1:
        combine_splits_kernel(
            lambda blocks: (count,), out, stats, o, lse, low, heads, queries, count, splits, d,
            next_power_of_2(d), next_power_of_2(splits),
        )  # fmt: skip
