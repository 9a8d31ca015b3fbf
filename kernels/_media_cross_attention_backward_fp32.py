"""Backward of `media_cross_attention` in fp32, deterministic as in 16 bits.

The forward keeps its inputs only, because the mean of dp is not exact enough in fp32 if it is taken
from the forward's result. The first kernel, one program per tile of rows, computes dq and stores
the statistics of the softmax. The second, one program per tile of a medium's keys, loops over the
tokens that may attend to it and computes dk and dv.
"""

from __future__ import annotations

from torch import Tensor

from ._attention_tiles import (
    SIZES,
    dot_parts,
    load_parts,
    mean_step,
    probabilities_and_score_gradients,
    store_parts,
    strides,
)
from ._attention_tilings import head_parts
from ._launcher import Config, kernel, precision
from ._media_mask import (
    first_of_tile,
    is_visible,
    load_index,
    tiles_of,
    tokens_of_medium,
    visible_range,
)
from ._sizes import cdiv
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


@kernel(Config({"BLOCK_N": 16}, num_warps=8, num_stages=1))
@triton.jit(do_not_specialize=[*SIZES, "media"])
def media_query_gradient_fp32_kernel(
    q_ptr, q_batch, q_head, q_query,  # (batch, heads, queries, d)
    do_ptr, do_batch, do_head, do_query,
    k_ptr, k_batch, k_head, k_key, v_ptr, v_batch, v_head, v_key,  # (batch, kv_heads, keys, d)
    index_ptr,  # (batch, queries) int64
    stats_ptr,  # (4, count) fp32 or None: largest score, 1 / sum of exponentials, delta, pivot
    dq_ptr, dq_batch, dq_head, dq_query,  # or None
    kv_heads, group, queries, rows, media, tokens_per_media, count, scale,
    ATTEND: tl.constexpr, UNATTENDED: tl.constexpr,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
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
    do1, do2 = load_parts(
        do_ptr + image * do_batch, head * do_head + query * do_query, inside, d, D1, D2
    )
    index, unattended_rows, low, high, _union = visible_range(
        index_ptr + image * queries, query, inside, media, ATTEND, UNATTENDED
    )
    k_ptr += image * k_batch + kv_head * k_head
    v_ptr += image * v_batch + kv_head * v_head
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    pivot = tl.zeros([BLOCK_M], tl.float32)
    excess = tl.zeros([BLOCK_M], tl.float32)
    total_error, excess_error = total, excess
    per_medium = tl.cdiv(tokens_per_media, BLOCK_N)
    start, end = tiles_of(low, high, per_medium)
    for at in range(start, end):
        medium = at // per_medium
        n = first_of_tile(at % per_medium, BLOCK_N) + tl.arange(0, BLOCK_N)
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
    if stats_ptr is not None:
        at = stats_ptr + (image * kv_heads * group + head) * queries + query
        tl.store(at, largest, mask=inside)
        tl.store(at + count, inverse, mask=inside)
        tl.store(at + count + count, delta, mask=inside)
        tl.store(at + count + count + count, pivot, mask=inside)
    if dq_ptr is not None:
        dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
        dq2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 16], tl.float32)
        for at in range(start, end):
            medium = at // per_medium
            n = first_of_tile(at % per_medium, BLOCK_N) + tl.arange(0, BLOCK_N)
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
            # Tiles are summed on their own first: that has a tenth of the rounding error of one
            # chain of thousands of additions.
            dq1 += tl.dot(ds, k1, input_precision=PRECISION) * scale
            if D2 > 0:
                dq2 += tl.dot(ds, k2, input_precision=PRECISION) * scale
        at = image * dq_batch + head * dq_head + query * dq_query
        store_parts(dq_ptr, at, inside, dq1, dq2, d, D1, D2)


@kernel(Config({"BLOCK_N": 16}, num_warps=8, num_stages=1))
@triton.jit(do_not_specialize=[*SIZES, "media"])
def media_key_gradient_fp32_kernel(
    q_ptr, q_batch, q_head, q_query,  # (batch, heads, queries, d)
    do_ptr, do_batch, do_head, do_query,
    k_ptr, k_batch, k_head, k_key, v_ptr, v_batch, v_head, v_key,  # (batch, kv_heads, keys, d)
    index_ptr,  # (batch, queries) int64
    stats_ptr,  # (4, count) fp32, written by media_query_gradient_fp32_kernel
    dk_ptr, dk_batch, dk_head, dk_key, dv_ptr, dv_batch, dv_head, dv_key,
    kv_heads, group, queries, media, tokens_per_media, count, scale,
    ATTEND: tl.constexpr, UNATTENDED: tl.constexpr,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    per_medium = tl.cdiv(tokens_per_media, BLOCK_N)
    n = first_of_tile(program % per_medium, BLOCK_N) + tl.arange(0, BLOCK_N)
    medium = program // per_medium % media
    kv_head = (program // per_medium // media % kv_heads).to(tl.int64)
    image = (program // per_medium // media // kv_heads).to(tl.int64)
    inside_keys = n < tokens_per_media
    key = medium.to(tl.int64) * tokens_per_media + n
    k_ptr += image * k_batch + kv_head * k_head
    v_ptr += image * v_batch + kv_head * v_head
    k1, k2 = load_parts(k_ptr, key * k_key, inside_keys, d, D1, D2)
    v1, v2 = load_parts(v_ptr, key * v_key, inside_keys, d, D1, D2)
    index_ptr += image * queries
    first, last, _ = tokens_of_medium(index_ptr, medium, queries, ATTEND, UNATTENDED)
    dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
    dv1 = tl.zeros([BLOCK_N, D1], tl.float32)
    dk2 = tl.zeros([BLOCK_N, D2 if D2 > 0 else 16], tl.float32)
    dv2 = tl.zeros([BLOCK_N, D2 if D2 > 0 else 16], tl.float32)
    blocks = tl.maximum(tl.cdiv(last - first, BLOCK_M), 0)
    for step in range((blocks.to(tl.int64) * group).to(tl.int32)):
        head = kv_head * group + step // blocks
        token = first + first_of_tile(step % blocks, BLOCK_M) + tl.arange(0, BLOCK_M)
        inside = token < last
        query = token.to(tl.int64)
        q1, q2 = load_parts(
            q_ptr + image * q_batch + head * q_head, query * q_query, inside, d, D1, D2
        )
        do1, do2 = load_parts(
            do_ptr + image * do_batch + head * do_head, query * do_query, inside, d, D1, D2
        )
        index, unattended_rows = load_index(index_ptr, query, inside, ATTEND)
        seen = is_visible(index, unattended_rows, inside, medium, ATTEND, UNATTENDED)
        stats = stats_ptr + (image * kv_heads * group + head) * queries + query
        largest = tl.load(stats, mask=inside, other=0.0)
        inverse = tl.load(stats + count, mask=inside, other=0.0)
        delta = tl.load(stats + count + count, mask=inside, other=0.0)
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
    # Computed again: registers that hold them through the loop would spill.
    n += tl.minimum(media, 0)
    inside_keys = n < tokens_per_media
    key = medium.to(tl.int64) * tokens_per_media + n
    dk_ptr += image * dk_batch + kv_head * dk_head
    dv_ptr += image * dv_batch + kv_head * dv_head
    store_parts(dv_ptr, key * dv_key, inside_keys, dv1, dv2, d, D1, D2)
    store_parts(dk_ptr, key * dk_key, inside_keys, dk1 * scale, dk2 * scale, d, D1, D2)


def launch_backward_fp32(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor,
    tokens_per_media: int, attend: str, unattended: str, scale: float,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None,
) -> None:  # fmt: skip
    """Fill those of dq, dk and dv that are not None."""
    batch, heads, queries, d = q.shape
    kv_heads, keys = k.shape[1:3]
    media, group = keys // tokens_per_media, heads // kv_heads
    rows, count = group * queries, batch * heads * queries
    block, widths = 16, (d, *head_parts(d))
    stats = None if dk is None else q.new_empty(4, count)
    shared = (q, *strides(q), do, *strides(do), k, *strides(k), v, *strides(v), index)
    programs_of_rows = batch * kv_heads * cdiv(rows, block)
    media_query_gradient_fp32_kernel(
        lambda blocks: (programs_of_rows,),
        *shared, stats, dq, *strides(dq),
        kv_heads, group, queries, rows, media, tokens_per_media, count, scale,
        attend, unattended, *widths, block, precision(q.dtype),
    )  # fmt: skip
    if dk is None or dv is None:
        return

    def programs(blocks: dict[str, int]) -> tuple[int, ...]:
        return (batch * kv_heads * media * cdiv(tokens_per_media, blocks["BLOCK_N"]),)

    media_key_gradient_fp32_kernel(
        programs,
        *shared, stats, dk, *strides(dk), dv, *strides(dv),
        kv_heads, group, queries, media, tokens_per_media, count, scale, attend, unattended,
        *widths, block, precision(q.dtype),
    )  # fmt: skip
