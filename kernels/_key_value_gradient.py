"""The kernel of the gradients of keys and values in 16 bits, where the rows need several tiles.

A program takes a tile of keys of one source and loops over all rows, whose mean of dp
`query_gradient_kernel` has stored. The last programs add the shares of the gradient of the queries.
"""

from __future__ import annotations

from ._attention_gradient_tiles import (
    load_mask,
    probabilities_and_gradients,
    store_keys,
    tile_offsets,
    tile_product,
)
from ._attention_shares import add_shares
from ._attention_tiles import SIZES, load_parts
from ._launcher import Config, kernel
from ._triton import tl, triton

CONFIGS = (  # `tiling` chooses by their numbers
    Config({"BLOCK_N": 32}, num_warps=4, num_stages=2),
    Config({"BLOCK_N": 64}, num_warps=4, num_stages=2),
    Config({"BLOCK_N": 128}, num_warps=8, num_stages=1),
    Config({"BLOCK_N": 128}, num_warps=8, num_stages=2),
)


@triton.jit
def _gradients_of_keys(
    tile, k_ptr, k_key, v_ptr, v_key, dk_ptr, dv_ptr, dk_key, keys, first_key, image, kv_head,
    q_ptr, q_head, q_query, do_ptr, do_head, do_query, lse_ptr, delta_ptr,
    bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
    seed_ptr, drop_below, survivor_scale, kv_heads, group, queries, scale,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    FULL: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    far = tile.to(tl.int64) * BLOCK_N
    n = far.to(tl.int32) + tl.arange(0, BLOCK_N)
    local, inside_keys = tl.arange(0, BLOCK_N), n < keys
    at = tile_offsets(local, k_key, WIDE)
    k1, k2 = load_parts(k_ptr + far * k_key, at, inside_keys, d, D1, D2)
    at = tile_offsets(local, v_key, WIDE)
    v1, v2 = load_parts(v_ptr + far * v_key, at, inside_keys, d, D1, D2)
    dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
    dv1 = tl.zeros([BLOCK_N, D1], tl.float32)
    dk2 = tl.zeros([BLOCK_N, D2 if D2 > 0 else 16], tl.float32)
    dv2 = tl.zeros([BLOCK_N, D2 if D2 > 0 else 16], tl.float32)
    if mask_ptr is not None:
        mask_ptr += image * mask_batch + tl.cast(first_key, tl.int64) * mask_key
    r = tl.arange(0, BLOCK_M)
    q_local, do_local = tile_offsets(r, q_query, WIDE), tile_offsets(r, do_query, WIDE)
    if FULL:  # then the compiler sees that loads of lse and delta are aligned
        queries = queries // BLOCK_M * BLOCK_M
    # Addresses go from tile to tile, and from the last tile of a head to the first of the next.
    blocks = tl.cdiv(queries, BLOCK_M)
    before = (blocks - 1).to(tl.int64) * BLOCK_M
    q_step, do_step = tl.cast(q_query, tl.int64) * BLOCK_M, tl.cast(do_query, tl.int64) * BLOCK_M
    q_jump, do_jump = q_head - before * q_query, do_head - before * do_query
    head, token = kv_head * group, 0
    place = (image * kv_heads * group + head) * queries
    q_ptr += head * q_head
    do_ptr += head * do_head
    lse_ptr += place
    delta_ptr += place
    for _ in range((blocks.to(tl.int64) * group).to(tl.int32)):
        inside = tl.full([BLOCK_M], True, tl.int1) if FULL else r < queries - token
        q1, q2 = load_parts(q_ptr, q_local, inside, d, D1, D2)
        do1, do2 = load_parts(do_ptr, do_local, inside, d, D1, D2)
        lse = tl.load(lse_ptr + r, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptr + r, mask=inside, other=0.0)
        query = (token + r).to(tl.int64)
        p, ds = probabilities_and_gradients(
            tile_product(k1, k2, q1, q2, D2, 0), tile_product(v1, v2, do1, do2, D2, 0),
            lse, delta, n, inside_keys, first_key, image, head, query,
            image * kv_heads * group + head + query * 0, inside,
            bias_ptr, bias_batch, bias_head, bias_query, bias_key,
            mask_ptr, mask_batch, mask_key, seed_ptr, drop_below, survivor_scale, scale,
            FULL, False, False, dtype, 0,
        )  # fmt: skip
        last = token + BLOCK_M >= queries
        q_ptr += tl.where(last, q_jump, q_step)
        do_ptr += tl.where(last, do_jump, do_step)
        rows = tl.where(last, queries - token, BLOCK_M)
        lse_ptr += rows
        delta_ptr += rows
        head += tl.where(last, 1, 0)
        token = tl.where(last, 0, token + BLOCK_M)
        dv1 = tl.dot(p, do1, dv1)
        dk1 = tl.dot(ds, q1, dk1)
        if D2 > 0:
            dv2 = tl.dot(p, do2, dv2)
            dk2 = tl.dot(ds, q2, dk2)
    if dtype != tl.bfloat16:
        dk1, dk2 = dk1 * scale, dk2 * scale
    seen = inside_keys
    hide: tl.constexpr = mask_ptr is not None  # what the loop yields for hidden keys is not 0
    if hide:
        seen = load_mask(mask_ptr, mask_key, n, keys) != 0
    at = tile_offsets(local, dk_key, WIDE)
    store_keys(dv_ptr + far * dk_key, at, inside_keys, seen, dv1, 0, d, D1, hide)
    store_keys(dk_ptr + far * dk_key, at, inside_keys, seen, dk1, 0, d, D1, hide)
    if D2 > 0:
        store_keys(dv_ptr + far * dk_key, at, inside_keys, seen, dv2, D1, d, D2, hide)
        store_keys(dk_ptr + far * dk_key, at, inside_keys, seen, dk2, D1, d, D2, hide)


@kernel(*CONFIGS, exclusive=True)
@triton.jit(do_not_specialize=[*SIZES, "keys2", "pairs", "shares"])
def key_value_gradient_kernel(
    q_ptr, q_batch, q_head, q_query,  # (batch, heads, queries, d)
    do_ptr, do_batch, do_head, do_query,
    lse_ptr, delta_ptr,  # (count,) fp32
    k_ptr, k_batch, k_head, k_key, v_ptr, v_batch, v_head, v_key,  # (batch, kv_heads, keys, d)
    k2_ptr, k2_batch, k2_head, k2_key, v2_ptr, v2_batch, v2_head, v2_key,  # or None
    bias_ptr, bias_batch, bias_head, bias_query, bias_key,
    mask_ptr, mask_batch, mask_key,  # (batch, keys + keys2) bytes
    seed_ptr, drop_below, survivor_scale,
    dk_ptr, dv_ptr, dk_batch, dk_head, dk_key,  # of both the same strides
    dk2_ptr, dv2_ptr, dk2_batch, dk2_head, dk2_key,
    shares_ptr, dq_ptr, size, shares,  # (shares, size) fp32 and (size,), or None
    kv_heads, group, queries, keys, keys2, pairs, scale,  # pairs: images times key heads
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    FULL: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles = tl.cdiv(keys, BLOCK_N)
    both = tiles + tl.cdiv(keys2, BLOCK_N)
    programs = pairs.to(tl.int64) * both  # of gradients
    if program < programs:
        tile, heads = program % both, program // both
        kv_head, image = (heads % kv_heads).to(tl.int64), (heads // kv_heads).to(tl.int64)
        k_ptr += image * k_batch + kv_head * k_head
        v_ptr += image * v_batch + kv_head * v_head
        dk_at = image * dk_batch + kv_head * dk_head
        dk_ptr += dk_at
        dv_ptr += dk_at
        first_key = 0
        if k2_ptr is not None:
            second = tile >= tiles
            tile = tl.where(second, tile - tiles, tile)
            first_key = tl.where(second, keys, 0)
            keys = tl.where(second, keys2, keys)
            k_ptr = tl.where(second, k2_ptr + image * k2_batch + kv_head * k2_head, k_ptr)
            v_ptr = tl.where(second, v2_ptr + image * v2_batch + kv_head * v2_head, v_ptr)
            k_key, v_key = tl.where(second, k2_key, k_key), tl.where(second, v2_key, v_key)
            dk_at = image * dk2_batch + kv_head * dk2_head
            dk_ptr = tl.where(second, dk2_ptr + dk_at, dk_ptr)
            dv_ptr = tl.where(second, dv2_ptr + dk_at, dv_ptr)
            dk_key = tl.where(second, dk2_key, dk_key)
        _gradients_of_keys(
            tile, k_ptr, k_key, v_ptr, v_key, dk_ptr, dv_ptr, dk_key, keys, first_key,
            image, kv_head, q_ptr + image * q_batch, q_head, q_query,
            do_ptr + image * do_batch, do_head, do_query, lse_ptr, delta_ptr,
            bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
            seed_ptr, drop_below, survivor_scale, kv_heads, group, queries, scale,
            d, D1, D2, BLOCK_M, FULL, WIDE, BLOCK_N,
        )  # fmt: skip
    elif shares_ptr is not None:
        add_shares(shares_ptr, dq_ptr, program - programs, size, shares)
