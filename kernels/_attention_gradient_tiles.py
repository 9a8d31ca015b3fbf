"""Tile operations of attention's backward in 16 bits.

The forward has kept two things of each row: the logarithm, to base 2, of the sum of exponentials of
its scores (``lse``), and its result o as two 16-bit numbers, ``high`` and ``low``. A tile lies
``[keys, rows]`` or ``[rows, keys]``; KEYS is the axis of the keys.
"""

from __future__ import annotations

from ._attention_tiles import LOG2_E, dropout_factor, load_parts, store_part
from ._triton import tl, triton

WIDE_STRIDE = 2**23 - 16  # of tokens; up to here the offsets in a tile of 256 fit in int32
LARGEST_STRIDE = tl.constexpr(WIDE_STRIDE)
ROUNDING = tl.constexpr(2.0**-22)  # of a score in fp32, which may be rounded twice


@triton.jit
def tile_offsets(local, stride, WIDE: tl.constexpr):
    """Offsets of a tile's rows from its first row, in int64 if WIDE, else in int32."""
    # One return, because Triton compares the types of all that a function has.
    return local.to(tl.int64) * stride if WIDE else local * tl.minimum(stride, LARGEST_STRIDE)


@triton.jit
def tile_product(a1, a2, b1, b2, D2: tl.constexpr, KEYS: tl.constexpr):
    """The products of keys a and rows b, summed over both parts."""
    if KEYS == 0:
        x = tl.dot(a1, tl.trans(b1))
        if D2 > 0:
            x = tl.dot(a2, tl.trans(b2), x)
    else:
        x = tl.dot(b1, tl.trans(a1))
        if D2 > 0:
            x = tl.dot(b2, tl.trans(a2), x)
    return x


@triton.jit
def row_offsets(row, head_stride, query_stride, queries, ONE_HEAD: tl.constexpr):
    """Offsets of rows of a key head from its first row, in int64; ONE_HEAD: it serves one head.

    Each is the sum of two products of 32-bit numbers, which take one instruction each.
    """
    if ONE_HEAD:
        return row.to(tl.int64) * query_stride
    return (row // queries).to(tl.int64) * head_stride + (row % queries).to(tl.int64) * query_stride


@triton.jit
def mean_of_dp(
    do1, do2, row, inside, first, rows, queries,
    o_ptr, o_head, o_query, low_ptr, low_head, low_query,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    ONE_HEAD: tl.constexpr, BLOCK_N: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """``sum(do * o)`` of each row of a tile, which is the mean of dp under its probabilities.

    o's high part takes the place of the values in the product that yields dp, and the diagonal of
    that product is taken. So where one key has all the weight, the mean equals that key's dp
    exactly.
    """
    at = row_offsets(row, low_head, low_query, queries, ONE_HEAD)
    low1, low2 = load_parts(low_ptr, at, inside, d, D1, D2)
    mean = tl.sum(do1.to(tl.float32) * low1.to(tl.float32), axis=1)
    if D2 > 0:
        mean += tl.sum(do2.to(tl.float32) * low2.to(tl.float32), axis=1)
    column = tl.arange(0, BLOCK_M)
    for start in tl.static_range(0, BLOCK_M, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at = row_offsets(first + n, o_head, o_query, queries, ONE_HEAD)
        there = (n < BLOCK_M) & (first + n < rows)
        high1, high2 = load_parts(o_ptr, at, there, d, D1, D2)
        product = tile_product(high1, high2, do1, do2, D2, KEYS)
        diagonal = tl.expand_dims(n, 1 - KEYS) == tl.expand_dims(column, KEYS)
        mean += tl.sum(tl.where(diagonal, product, 0.0), axis=KEYS)
    return mean


@triton.jit
def load_mask(ptr, stride, n, keys):
    """The bytes of the mask of keys n; 0 past the last key."""
    return tl.load(ptr + n.to(tl.int64) * stride, mask=n < keys, other=0)


@triton.jit
def store_keys(
    ptr, row, inside, seen, x, first: tl.constexpr, d: tl.constexpr, D: tl.constexpr,
    HIDE: tl.constexpr,
):  # fmt: skip
    """Store what `store_part` stores; with HIDE zeros for those keys that are not ``seen``.

    Two stores cost less than a selection of every element.
    """
    if HIDE:
        store_part(ptr, row, inside & seen, x, first, d, D)
        store_part(ptr, row, inside & (seen == 0), tl.zeros_like(x), first, d, D)
    else:
        store_part(ptr, row, inside, x, first, d, D)


@triton.jit
def largest_exponent(lse, inside):
    """The largest exponent that a row's probabilities may have: 0, and -Inf for rows past the last.

    A row of NaN has NaN.
    """
    return tl.where(inside, tl.where(lse != lse, lse, 0.0), -float("inf"))


@triton.jit
def probabilities_and_gradients(
    s, dp, lse, delta, n, inside_keys, first, image, head, query, batch_head, inside,
    bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
    seed_ptr, drop_below, survivor_scale, scale,
    FULL: tl.constexpr, HIDE: tl.constexpr, CLAMP: tl.constexpr, dtype: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of p after dropout and of ds, in ``dtype``, from the products s and dp.

    ``lse`` is +Inf for rows that see no key, so their p is 0. In bf16 ds includes the factor
    ``scale``, and so does ``delta``, the mean of dp; in fp16 that would make small numbers
    subnormal. ``first`` is the number of the source's first key among the keys of all sources.
    FULL: all rows of the tile exist, else those that are ``inside``. HIDE: p and ds of hidden keys
    are 0; else they have no meaning, and with CLAMP they are at least finite.
    """
    exponent = s * (scale * LOG2_E) - tl.expand_dims(lse, KEYS)
    if bias_ptr is not None:
        row = image * bias_batch + head * bias_head + query * bias_query
        key = (first + n).to(tl.int64) * bias_key
        at = bias_ptr + (tl.expand_dims(row, KEYS) + tl.expand_dims(key, 1 - KEYS))
        there = tl.expand_dims(inside_keys, 1 - KEYS) & tl.expand_dims(inside, KEYS)
        exponent += tl.load(at, mask=there, other=0.0).to(tl.float32) * LOG2_E
    seen = tl.expand_dims(inside_keys, 1 - KEYS)
    if HIDE:
        lowest = -float("inf")
        if mask_ptr is not None:
            at = mask_ptr + image * mask_batch + (first + n).to(tl.int64) * mask_key
            seen = tl.expand_dims(tl.load(at, mask=inside_keys, other=0) != 0, 1 - KEYS)
            if KEYS == 0:  # a row of NaN is NaN at hidden keys too; elsewhere registers would spill
                lowest = tl.expand_dims(tl.where(lse != lse, lse, -float("inf")), KEYS)
        exponent = tl.where(seen, exponent, lowest)
    if CLAMP or not FULL:  # a row past the last has 0 * Inf = NaN
        exponent = tl.minimum(exponent, tl.expand_dims(largest_exponent(lse, inside), KEYS))
    p = tl.exp2(exponent)
    dropped = p
    if seed_ptr is not None:
        factor = dropout_factor(
            seed_ptr, drop_below, survivor_scale, first + n, query, batch_head, KEYS
        )
        dp *= factor
        dropped = p * factor
    if dtype == tl.bfloat16:
        dp *= scale
    ds = p * (dp - tl.expand_dims(delta, KEYS))
    if seed_ptr is not None:  # a key with all the weight: the rounding of a scaled o would remain
        rounding = tl.abs(tl.expand_dims(lse, KEYS)) * ROUNDING
        ds = tl.where((p == 1.0) | (tl.abs(exponent) <= rounding), 0.0, ds)
    if HIDE and mask_ptr is not None:  # 0 even where a hidden value is not finite
        ds = tl.where(seen, ds, 0.0)
    return dropped.to(dtype), ds.to(dtype)
