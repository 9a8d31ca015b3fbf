"""Attention of text tokens to the media (images) that each token may attend to.

A program takes a tile of rows (the queries of all heads that share a key head) and loops over the
keys of the media that some row of the tile attends to. It computes no scores for other media.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _media_cross_attention_aten as aten
from ._attention_shares import combine_splits_kernel, key_splits
from ._attention_tiles import (
    LOG2_OF_E,
    SIZES,
    dot_parts,
    load_parts,
    rms_norm,
    softmax_step,
    store_parts,
    strides,
)
from ._attention_tilings import head_parts, tile_divisor
from ._cross_attention_aten import by_tokens
from ._launcher import Config, dense, is_traced, kernel, precision, runs_triton
from ._media_cross_attention_backward import launch_backward
from ._media_mask import first_of_tile, is_visible, tiles_of, visible_range
from ._sizes import cdiv, next_power_of_2
from ._triton import tl, triton


@triton.jit
def _attend_to_medium(
    largest, total, acc1, acc2, q1, q2, seen, unattended_rows,
    k_ptr, k_key, v_ptr, v_key, medium, first, tokens_per_media, scale,
    UNATTENDED: tl.constexpr, d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over one tile of a medium's keys."""
    n = first + tl.arange(0, TILE)
    inside = n < tokens_per_media
    key = medium.to(tl.int64) * tokens_per_media + n
    k1, k2 = load_parts(k_ptr, key * k_key, inside, d, D1, D2)
    v1, v2 = load_parts(v_ptr, key * v_key, inside, d, D1, D2)
    s = dot_parts(q1, q2, k1, k2, D2, PRECISION) * scale
    if UNATTENDED == "uniform":
        s = tl.where(unattended_rows[:, None], 0.0, s)
    s = tl.where(seen[:, None] & inside[None, :], s, -float("inf"))
    p, rescale, largest, total = softmax_step(s, largest, total, v1.dtype, 1)
    p = p.to(v1.dtype)
    acc1 = tl.dot(p, v1, acc1 * rescale[:, None], input_precision=PRECISION)
    if D2 > 0:
        acc2 = tl.dot(p, v2, acc2 * rescale[:, None], input_precision=PRECISION)
    return largest, total, acc1, acc2


@kernel(Config({"BLOCK_N": 32}, num_warps=4, num_stages=1))  # other configs spill on some GPU
@triton.jit(do_not_specialize=[*SIZES, "media", "splits"])
def media_cross_attention_kernel(
    q_ptr, q_batch, q_head, q_query,  # (batch, heads, queries, d)
    k_ptr, k_batch, k_head, k_key, v_ptr, v_batch, v_head, v_key,  # (batch, kv_heads, keys, d)
    index_ptr,  # (batch, queries) int64
    q_norm_ptr,  # (d,) or None: the queries are not normed
    o_ptr,  # (batch, queries, heads, d); with several splits (splits, count, d) fp32, and
    stats_ptr,  # (splits, 2, count) fp32: largest score, sum of exponentials
    kv_heads, group, queries, rows, media, tokens_per_media, count, splits, scale, eps,
    ATTEND: tl.constexpr, UNATTENDED: tl.constexpr,
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
    if q_norm_ptr is not None:
        q1, q2 = rms_norm(q1, q2, inside_rows, q_norm_ptr, eps, d, D1, D2)
    index, unattended_rows, low, high = visible_range(
        index_ptr + image * queries, query, inside_rows, media, ATTEND, UNATTENDED
    )
    k_ptr += image * k_batch + kv_head * k_head
    v_ptr += image * v_batch + kv_head * v_head
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 16], tl.float32)
    # The tiles of the media in range have consecutive numbers, divided among the splits.
    per_medium = tl.cdiv(tokens_per_media, TILE)
    start, end = tiles_of(low, high, per_medium)
    share = tl.cdiv(end - start, splits)
    start += (split * share).to(tl.int32)
    for at in range(start, tl.minimum(start + share, end)):
        medium, first = at // per_medium, first_of_tile(at % per_medium, TILE)
        seen = is_visible(index, unattended_rows, inside_rows, medium, ATTEND, UNATTENDED)
        if ATTEND == "listed":
            if tl.max(seen.to(tl.int32), axis=0) > 0:
                largest, total, acc1, acc2 = _attend_to_medium(
                    largest, total, acc1, acc2, q1, q2, seen, unattended_rows,
                    k_ptr, k_key, v_ptr, v_key, medium, first, tokens_per_media, scale,
                    UNATTENDED, d, D1, D2, TILE, PRECISION,
                )  # fmt: skip
        else:
            largest, total, acc1, acc2 = _attend_to_medium(
                largest, total, acc1, acc2, q1, q2, seen, unattended_rows,
                k_ptr, k_key, v_ptr, v_key, medium, first, tokens_per_media, scale,
                UNATTENDED, d, D1, D2, TILE, PRECISION,
            )  # fmt: skip
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
        out_row = ((image * queries + query) * kv_heads * group + head) * d
        store_parts(o_ptr, out_row, inside_rows, acc1, acc2, d, D1, D2)


def media_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    media_index: Tensor,
    q_norm: Tensor | None,
    *,
    tokens_per_media: int,
    attend: str,
    unattended: str,
    scale: float,
    eps: float,
) -> Tensor:
    """Return ``(batch, heads, queries, d)``, laid out in memory as ``(batch, queries, heads, d)``.

    The arguments are those of the op `media_cross_attention`. An index of a medium that does not
    exist selects nothing.
    """
    q, k, v, index = dense(q), dense(k), dense(v), media_index.contiguous()
    if q_norm is not None and not _norms_inside(q):
        q, q_norm = _normed(q, q_norm, eps)[0], None
    empty = q.numel() == 0 or k.shape[2] == 0
    if not (runs_triton(q) or is_traced(q) or empty):
        return aten.forward(q, k, v, index, tokens_per_media, attend, unattended, scale)
    o = by_tokens(q)
    if empty:
        o.zero_()
    elif runs_triton(q):
        q_norm = q_norm if q_norm is None else q_norm.contiguous()
        _launch_forward(
            q, k, v, index, q_norm, tokens_per_media, attend, unattended, scale, eps, o
        )  # fmt: skip
    return o


def media_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    media_index: Tensor,
    q_norm: Tensor | None,
    *,
    tokens_per_media: int,
    attend: str,
    unattended: str,
    scale: float,
    eps: float,
    want_q: bool,
    want_kv: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v and q_norm, or None for those that are not wanted.

    The first three are laid out in memory as ``(batch, tokens, heads, d)``. The gradient of q_norm
    is computed whenever q's is.
    """
    if q_norm is not None and not _norms_inside(q):
        normed, inverse = _normed(q, q_norm, eps)
        dnormed, dk, dv, _ = media_attention_backward(
            do, normed, k, v, media_index, None, tokens_per_media=tokens_per_media, attend=attend,
            unattended=unattended, scale=scale, eps=eps, want_q=want_q, want_kv=want_kv,
        )  # fmt: skip
        if dnormed is None:
            return None, dk, dv, None
        found = _norm_backward(dnormed, q, q_norm, inverse)
        return found[0], dk, dv, found[1]
    do, q, k, v = dense(do), dense(q), dense(k), dense(v)
    index = media_index.contiguous()
    dq = by_tokens(q) if want_q else None
    dk, dv = (by_tokens(k), by_tokens(k)) if want_kv else (None, None)
    dq_norm: Tensor | None = None
    if q.numel() == 0 or k.shape[2] == 0:
        for gradient in (dq, dk, dv):
            if gradient is not None:
                gradient.zero_()
        if q_norm is not None and want_q:
            dq_norm = torch.zeros_like(q_norm)
    elif runs_triton(q):
        q_norm = q_norm if q_norm is None else q_norm.contiguous()
        dq_norm = launch_backward(
            do, q, k, v, index, q_norm, tokens_per_media, attend, unattended, scale, eps,
            dq, dk, dv,
        )  # fmt: skip
    elif not is_traced(q):
        aten.backward(
            do, q, k, v, index, tokens_per_media, attend, unattended, scale, dq, dk, dv
        )  # fmt: skip
    return dq, dk, dv, dq_norm


def _norms_inside(q: Tensor) -> bool:
    """Whether the kernels norm the queries. fp32 products leave no registers for it."""
    return runs_triton(q) and q.dtype != torch.float32


def _normed(q: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMS norm in plain PyTorch, rounded before the weight; and 1 / rms in fp32."""
    wide = q.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return ((wide * inverse).to(q.dtype) * weight).to(q.dtype), inverse


def _norm_backward(
    dnormed: Tensor, q: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Backward of `_normed`: gradients of the queries and of the weight.

    The first is laid out in memory as ``(batch, queries, heads, d)``.
    """
    unit = q.float() * inverse
    dweight = (dnormed * unit.to(q.dtype)).sum((0, 1, 2), dtype=torch.float32).to(weight.dtype)
    dunit = dnormed * weight.float()
    dq = (dunit - unit * (dunit * unit).mean(-1, keepdim=True)) * inverse
    return dq.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), dweight


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, q_norm: Tensor | None,
    tokens_per_media: int, attend: str, unattended: str, scale: float, eps: float, o: Tensor,
) -> None:  # fmt: skip
    batch, heads, queries, d = q.shape
    kv_heads, keys = k.shape[1:3]
    rows, count = heads // kv_heads * queries, batch * heads * queries
    # fp32 products run on scalar units; with 64 rows their registers would spill.
    block = 16 if rows <= 16 or q.dtype == torch.float32 else 64
    programs = batch * kv_heads * cdiv(rows, block)
    # With "latest" a row attends to the keys of one medium, else possibly to all keys.
    splits = key_splits(programs, tokens_per_media if attend == "latest" else keys)
    out, stats = o, None
    if splits > 1:
        out = q.new_empty(splits, count, d, dtype=torch.float32)
        stats = q.new_empty(splits, 2, count, dtype=torch.float32)
    media_cross_attention_kernel(
        lambda blocks: (programs * splits,),
        q, *strides(q), k, *strides(k), v, *strides(v), index, q_norm, out, stats,
        kv_heads, heads // kv_heads, queries, rows, keys // tokens_per_media, tokens_per_media,
        count, splits, scale * LOG2_OF_E, eps, attend, unattended,  # scores are to base 2
        d, *head_parts(d), block, tile_divisor(q.dtype, d), splits > 1, precision(q.dtype),
    )  # fmt: skip
    if splits > 1:
        combine_splits_kernel(
            lambda blocks: (count,), out, stats, o, None, None, heads, queries, count, splits, d,
            next_power_of_2(d), next_power_of_2(splits),
        )  # fmt: skip
