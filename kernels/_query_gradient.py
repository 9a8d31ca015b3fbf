"""The kernel of the gradient of the queries in 16 bits; for few rows it yields every gradient.

A program takes a tile of rows and a share of the keys of one source. It reads the keys once.
"""

from __future__ import annotations

from ._attention_gradient_tiles import (
    load_mask,
    mean_of_dp,
    probabilities_and_gradients,
    row_offsets,
    store_keys,
    tile_offsets,
    tile_product,
)
from ._attention_tiles import SIZES, load_parts, store_parts
from ._launcher import Config, kernel
from ._triton import tl, triton

CONFIGS = (  # `tiling` chooses by their numbers
    Config({"BLOCK_N": 32}, num_warps=4, num_stages=2),
    Config({"BLOCK_N": 64}, num_warps=4, num_stages=2),
    Config({"BLOCK_N": 64}, num_warps=8, num_stages=2),
    Config({"BLOCK_N": 32}, num_warps=8, num_stages=2),
)


@kernel(*CONFIGS, exclusive=True)
@triton.jit(do_not_specialize=[*SIZES, "keys2", "splits", "splits2"])
def query_gradient_kernel(
    q_ptr, q_batch, q_head, q_query,  # (batch, heads, queries, d)
    do_ptr, do_batch, do_head, do_query,
    o_ptr, o_batch, o_head, o_query,  # the forward's result, and what its rounding took off
    low_ptr, low_batch, low_head, low_query,
    lse_ptr,  # (count,) fp32, to base 2
    delta_ptr,  # (count,) fp32 or None: where to store the mean of dp
    k_ptr, k_batch, k_head, k_key, v_ptr, v_batch, v_head, v_key,  # (batch, kv_heads, keys, d)
    k2_ptr, k2_batch, k2_head, k2_key, v2_ptr, v2_batch, v2_head, v2_key,  # or None
    bias_ptr, bias_batch, bias_head, bias_query, bias_key,
    mask_ptr, mask_batch, mask_key,  # (batch, keys + keys2) bytes
    seed_ptr, drop_below, survivor_scale,
    dq_ptr, dq_batch, dq_head, dq_query, dq_split,  # or None; fp32 shares if there are splits
    dk_ptr, dv_ptr, dk_batch, dk_head, dk_key,  # of both the same strides; None if several tiles
    dk2_ptr, dv2_ptr, dk2_batch, dk2_head, dk2_key,
    kv_heads, group, queries, rows, keys, keys2, count, splits, splits2, scale,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    ONE_HEAD: tl.constexpr, FULL: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    # Of keys that lie along the columns, a thread would read a quarter of the tile's mask. Instead
    # hidden keys are loaded as zeros: they add nothing to dq, if ds is finite. In fp16 ds may
    # overflow; with dropout, or with dk and dv of wide heads, registers would spill.
    ZEROED: tl.constexpr = (
        KEYS == 1 and dtype == tl.bfloat16 and seed_ptr is None and (dk_ptr is None or D2 < 32)
    )
    HIDE: tl.constexpr = ZEROED and mask_ptr is not None
    program = tl.program_id(0)
    shares = splits + splits2
    split, program = (program % shares).to(tl.int64), program // shares
    tiles = tl.cdiv(rows, BLOCK_M)
    first = ((program % tiles).to(tl.int64) * BLOCK_M).to(tl.int32)
    kv_head = (program // tiles % kv_heads).to(tl.int64)
    image = (program // tiles // kv_heads).to(tl.int64)
    row = first + tl.arange(0, BLOCK_M)
    inside = row < rows
    first_head = kv_head * group
    place = (image * kv_heads * group + first_head) * queries + row
    at = row_offsets(row, do_head, do_query, queries, ONE_HEAD)
    do_ptr += image * do_batch + first_head * do_head
    do1, do2 = load_parts(do_ptr, at, inside, d, D1, D2)
    delta = mean_of_dp(
        do1, do2, row, inside, first, rows, queries,
        o_ptr + image * o_batch + first_head * o_head, o_head, o_query,
        low_ptr + image * low_batch + first_head * low_head, low_head, low_query,
        d, D1, D2, BLOCK_M, ONE_HEAD, BLOCK_N, KEYS,
    )  # fmt: skip
    if dtype == tl.bfloat16:
        delta *= scale
    if delta_ptr is not None:
        tl.store(delta_ptr + place, delta, mask=inside & (split == 0))
    lse = tl.load(lse_ptr + place, mask=inside, other=float("inf"))
    at = row_offsets(row, q_head, q_query, queries, ONE_HEAD)
    q_ptr += image * q_batch + first_head * q_head
    q1, q2 = load_parts(q_ptr, at, inside, d, D1, D2)
    head, query = first_head + row.to(tl.int64) * 0, row.to(tl.int64)  # of bias and dropout
    if not ONE_HEAD:
        head, query = first_head + row // queries, (row % queries).to(tl.int64)
    batch_head = image * kv_heads * group + head
    # The program's source: where it begins, how many keys it has and the number of its first.
    k_ptr += image * k_batch + kv_head * k_head
    v_ptr += image * v_batch + kv_head * v_head
    if dk_ptr is not None:
        dk_ptr += image * dk_batch + kv_head * dk_head
        dv_ptr += image * dk_batch + kv_head * dk_head
    first_key, own_split, own_splits = 0, split, splits
    if k2_ptr is not None:
        second = split >= splits
        own_split = tl.where(second, split - splits, split)
        own_splits = tl.where(second, splits2, splits)
        first_key = tl.where(second, keys, 0)
        keys = tl.where(second, keys2, keys)
        k_ptr = tl.where(second, k2_ptr + image * k2_batch + kv_head * k2_head, k_ptr)
        v_ptr = tl.where(second, v2_ptr + image * v2_batch + kv_head * v2_head, v_ptr)
        k_key, v_key = tl.where(second, k2_key, k_key), tl.where(second, v2_key, v_key)
        if dk_ptr is not None:
            at = image * dk2_batch + kv_head * dk2_head
            dk_ptr = tl.where(second, dk2_ptr + at, dk_ptr)
            dv_ptr = tl.where(second, dv2_ptr + at, dv_ptr)
            dk_key = tl.where(second, dk2_key, dk_key)
    local = tl.arange(0, BLOCK_N)
    k_local, v_local = tile_offsets(local, k_key, WIDE), tile_offsets(local, v_key, WIDE)
    if KEYS == 1:
        dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
        dq2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 16], tl.float32)
    else:
        dq1 = tl.zeros([D1, BLOCK_M], tl.float32)
        dq2 = tl.zeros([D2 if D2 > 0 else 16, BLOCK_M], tl.float32)
    share = tl.cdiv(tl.cdiv(keys, BLOCK_N), own_splits)
    start = tl.minimum(own_split * share * BLOCK_N, keys).to(tl.int32)
    end = tl.minimum((own_split + 1) * share * BLOCK_N, keys).to(tl.int32)
    far = tl.cast(start, tl.int64)
    k_ptr += far * k_key
    v_ptr += far * v_key
    if HIDE:
        mask_ptr += image * mask_batch + (first_key + far) * mask_key
        seen = load_mask(mask_ptr, mask_key, local, keys - start)
    for begin in range(start, end, BLOCK_N):
        n = begin + local
        inside_keys = n < keys
        loaded = seen != 0 if HIDE else inside_keys
        k1, k2 = load_parts(k_ptr, k_local, loaded, d, D1, D2)
        v1, v2 = load_parts(v_ptr, v_local, loaded, d, D1, D2)
        if HIDE:  # of the next tile
            mask_ptr += tl.cast(mask_key, tl.int64) * BLOCK_N
            seen = load_mask(mask_ptr, mask_key, local, keys - begin - BLOCK_N)
        p, ds = probabilities_and_gradients(
            tile_product(k1, k2, q1, q2, D2, KEYS), tile_product(v1, v2, do1, do2, D2, KEYS),
            lse, delta, n, inside_keys, first_key, image, head, query, batch_head, inside,
            bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
            seed_ptr, drop_below, survivor_scale, scale,
            FULL, not ZEROED, ZEROED, dtype, KEYS,
        )  # fmt: skip
        if dq_ptr is not None:
            if KEYS == 1:
                dq1 = tl.dot(ds, k1, dq1)
                if D2 > 0:
                    dq2 = tl.dot(ds, k2, dq2)
            else:
                dq1 = tl.dot(tl.trans(k1), ds, dq1)
                if D2 > 0:
                    dq2 = tl.dot(tl.trans(k2), ds, dq2)
        if dk_ptr is not None:
            if KEYS == 1:
                p, ds = tl.trans(p), tl.trans(ds)
            far = tl.cast(begin, tl.int64) * dk_key
            dk_local = tile_offsets(local, dk_key, WIDE)
            x = tl.dot(p, do1)
            store_keys(dv_ptr + far, dk_local, inside_keys, loaded, x, 0, d, D1, HIDE)
            x = tl.dot(ds, q1)
            x = x if dtype == tl.bfloat16 else x * scale
            store_keys(dk_ptr + far, dk_local, inside_keys, loaded, x, 0, d, D1, HIDE)
            if D2 > 0:
                x = tl.dot(p, do2)
                store_keys(dv_ptr + far, dk_local, inside_keys, loaded, x, D1, d, D2, HIDE)
                x = tl.dot(ds, q2)
                x = x if dtype == tl.bfloat16 else x * scale
                store_keys(dk_ptr + far, dk_local, inside_keys, loaded, x, D1, d, D2, HIDE)
        k_ptr += tl.cast(k_key, tl.int64) * BLOCK_N
        v_ptr += tl.cast(v_key, tl.int64) * BLOCK_N
    if dq_ptr is not None:
        if dtype != tl.bfloat16:
            dq1, dq2 = dq1 * scale, dq2 * scale
        if KEYS == 0:
            dq1, dq2 = tl.trans(dq1), tl.trans(dq2)
        dq_ptr += split * dq_split + image * dq_batch + first_head * dq_head
        at = row_offsets(row, dq_head, dq_query, queries, ONE_HEAD)
        store_parts(dq_ptr, at, inside, dq1, dq2, d, D1, D2)
