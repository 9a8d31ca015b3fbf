"""The kernel of the gradient of media attention's queries in 16 bits.

A program takes a tile of rows and loops over the keys that some row sees.
"""

from __future__ import annotations

from ._attention_gradient_tiles import mean_of_dp, tile_offsets, tile_product
from ._attention_tiles import SIZES, load_part, rms_norm, rms_norm_backward, store_part
from ._launcher import kernel
from ._media_attention_tilings import OF_QUERIES
from ._media_gradient_tiles import media_probabilities_and_gradients, scale_of_dp
from ._media_mask import first_of_tile, is_visible, tiles_of, visible_range, zero_where_equal
from ._triton import tl, triton


@triton.jit
def _add_tile(
    dq, q, do, lse, delta, index, unattended_rows, inside,
    k_ptr, k_key, v_ptr, v_key, medium, first, tokens_per_media, scale,
    ATTEND: tl.constexpr, UNATTENDED: tl.constexpr, WIDE: tl.constexpr, KEYS: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the part of dq of the keys of a medium from its token ``first`` on."""
    local = tl.arange(0, BLOCK_N)
    inside_keys = first + local < tokens_per_media
    far = tl.cast(medium, tl.int64) * tokens_per_media + first
    at = tile_offsets(local, k_key, WIDE)
    k = load_part(k_ptr + far * k_key, at, inside_keys, 0, d, D)
    at = tile_offsets(local, v_key, WIDE)
    v = load_part(v_ptr + far * v_key, at, inside_keys, 0, d, D)
    seen = is_visible(index, unattended_rows, inside, medium, ATTEND, UNATTENDED)
    factor = scale_of_dp(unattended_rows, scale, UNATTENDED, q.dtype, KEYS)
    _, ds = media_probabilities_and_gradients(
        tile_product(k, k, q, q, 0, KEYS), tile_product(v, v, do, do, 0, KEYS),
        lse, delta, inside_keys, seen, scale, factor, KEYS,
    )  # fmt: skip
    ds = ds.to(q.dtype)
    return tl.dot(ds, k, dq) if KEYS == 1 else tl.dot(tl.trans(k), ds, dq)


@kernel(*OF_QUERIES, exclusive=True)
@triton.jit(do_not_specialize=[*SIZES, "media"])
def media_query_gradient_kernel(
    q_ptr, q_batch, q_head, q_query,  # (batch, heads, queries, d)
    do_ptr, do_batch, do_head, do_query,
    o_ptr, low_ptr,  # (batch, queries, heads, d): o and what its rounding took off
    lse_ptr,  # (count,) fp32, to base 2
    stats_ptr,  # (count, 2) fp32 or None: where to store lse and the mean of dp
    k_ptr, k_batch, k_head, k_key, v_ptr, v_batch, v_head, v_key,  # (batch, kv_heads, keys, d)
    index_ptr,  # (batch, queries) int64
    q_norm_ptr,  # (d,) or None
    normed_ptr,  # (count, d) or None: where to store the normed queries
    dq_ptr,  # as o, or None
    dq_norm_ptr,  # (programs, d) fp32 or None
    kv_heads, group, queries, rows, media, tokens_per_media, scale, eps,
    ATTEND: tl.constexpr, UNATTENDED: tl.constexpr, NESTED: tl.constexpr, WIDE: tl.constexpr,
    KEYS: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    program = tl.program_id(0)
    tiles = tl.cdiv(rows, BLOCK_M)
    first = ((program % tiles).to(tl.int64) * BLOCK_M).to(tl.int32)
    kv_head = (program // tiles % kv_heads).to(tl.int64)
    image = (program // tiles // kv_heads).to(tl.int64)
    row = first + tl.arange(0, BLOCK_M)
    inside = row < rows
    head, query = kv_head * group + row // queries, (row % queries).to(tl.int64)
    place = (image * kv_heads * group + head) * queries + query
    at = head * do_head + query * do_query
    do = load_part(do_ptr + image * do_batch, at, inside, 0, d, D)
    o_query = tl.cast(kv_heads, tl.int64) * group * d
    at_o = image * queries * o_query + kv_head * group * d  # of the first head
    delta = mean_of_dp(
        do, do, row, inside, first, rows, queries,
        o_ptr + at_o, d, o_query, low_ptr + at_o, d, o_query,
        d, D, 0, BLOCK_M, False, BLOCK_N, KEYS,
    )  # fmt: skip
    index, unattended_rows, low, high, union = visible_range(
        index_ptr + image * queries, query, inside, media, ATTEND, UNATTENDED
    )
    if dtype == tl.bfloat16:
        delta *= scale
    if UNATTENDED == "uniform":
        delta = tl.where(unattended_rows, 0.0, delta)
    lse = tl.load(lse_ptr + place, mask=inside, other=float("inf"))
    if stats_ptr is not None:
        tl.store(stats_ptr + 2 * place, lse, mask=inside)
        tl.store(stats_ptr + 2 * place + 1, delta, mask=inside)
    q_ptr += image * q_batch
    q = load_part(q_ptr, head * q_head + query * q_query, inside, 0, d, D)
    if q_norm_ptr is not None:
        q, _ = rms_norm(q, q, inside, q_norm_ptr, eps, d, D, 0)
        if normed_ptr is not None:
            store_part(normed_ptr, place * d, inside, q, 0, d, D)
    q = zero_where_equal(q, unattended_rows, UNATTENDED)
    k_ptr += image * k_batch + kv_head * k_head
    v_ptr += image * v_batch + kv_head * v_head
    dq = tl.zeros([BLOCK_M, D] if KEYS == 1 else [D, BLOCK_M], tl.float32)
    if dq_ptr is not None:
        per_medium = tl.cdiv(tokens_per_media, BLOCK_N)
        if NESTED:
            for medium in range(low, high):
                if (union >> tl.cast(medium, tl.int64)) & 1 != 0:
                    for tile in range(per_medium):
                        dq = _add_tile(
                            dq, q, do, lse, delta, index, unattended_rows, inside,
                            k_ptr, k_key, v_ptr, v_key, medium, first_of_tile(tile, BLOCK_N),
                            tokens_per_media, scale, ATTEND, UNATTENDED, WIDE, KEYS, d, D, BLOCK_N,
                        )  # fmt: skip
        else:
            start, end = tiles_of(low, high, per_medium)
            for at in range(start, end):
                dq = _add_tile(
                    dq, q, do, lse, delta, index, unattended_rows, inside,
                    k_ptr, k_key, v_ptr, v_key, at // per_medium,
                    first_of_tile(at % per_medium, BLOCK_N),
                    tokens_per_media, scale, ATTEND, UNATTENDED, WIDE, KEYS, d, D, BLOCK_N,
                )  # fmt: skip
        if dtype != tl.bfloat16:
            dq *= scale
        if KEYS == 0:
            dq = tl.trans(dq)
        # Computed again: registers that hold them through the loop would spill.
        row += tl.minimum(media, 0)
        head, query = kv_head * group + row // queries, (row % queries).to(tl.int64)
        inside = row < rows
        if q_norm_ptr is not None:
            q = load_part(q_ptr, head * q_head + query * q_query, inside, 0, d, D)
            dq, _ = rms_norm_backward(
                q, q, dq, dq, inside, q_norm_ptr, dq_norm_ptr + program.to(tl.int64) * d, eps,
                d, D, 0,
            )  # fmt: skip
        at = ((image * queries + query) * kv_heads * group + head) * d
        store_part(dq_ptr, at, inside, dq, 0, d, D)
