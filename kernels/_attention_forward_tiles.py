"""The loop of attention's forward over the keys of one source, for two layouts of a tile.

KEYS is the axis of the keys. 0: tiles lie ``[keys, rows]``, with every kind of mask and in every
dtype. 1: they lie ``[rows, keys]``, in 16 bits, without bias or dropout and with a positive
scale. The maximum of a row is then found within a warp, and the probabilities stay in registers for
the product with the values.
"""

from __future__ import annotations

from ._attention_gradient_tiles import tile_offsets
from ._attention_tiles import (
    LOG2_E,
    dot_parts,
    dropout_factor,
    load_parts,
    score_tile,
    softmax_step,
)
from ._online_softmax import add_exponentials, empty_sums, exponentials, rescaled
from ._triton import tl, triton


@triton.jit
def head_and_query(row, kv_head, group, queries, ONE_HEAD: tl.constexpr):
    """The head and the query of rows of a key head, in int64; ONE_HEAD: it serves one head."""
    if ONE_HEAD:
        return kv_head + row.to(tl.int64) * 0, row.to(tl.int64)
    return kv_head * group + row // queries, (row % queries).to(tl.int64)


@triton.jit
def new_sums(
    BLOCK_M: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, KEYS: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Start of the online softmax: largest score, sum of exponentials, and weighted values."""
    D: tl.constexpr = D2 if D2 > 0 else 16
    if KEYS == 1:
        largest, total = empty_sums(BLOCK_M, dtype)
        acc1, acc2 = tl.zeros([BLOCK_M, D1], tl.float32), tl.zeros([BLOCK_M, D], tl.float32)
    else:
        largest, total = empty_sums(BLOCK_M, tl.float32)
        acc1, acc2 = tl.zeros([D1, BLOCK_M], tl.float32), tl.zeros([D, BLOCK_M], tl.float32)
    return largest, total, acc1, acc2


@triton.jit
def _hide(
    product, begin, n, inside, keys, first, image, mask_ptr, mask_batch, mask_key
):  # fmt: skip
    """Products ``[rows, keys]``, -Inf for keys that are not seen.

    Only the last tile of a source has keys that do not exist.
    """
    if mask_ptr is not None:
        at = mask_ptr + image * mask_batch + (first + n).to(tl.int64) * mask_key
        seen = tl.load(at, mask=inside, other=0) != 0
        product = tl.where(seen[None, :], product, -float("inf"))
    elif begin + n.shape[0] > keys:
        product = tl.where(inside[None, :], product, -float("inf"))
    return product


@triton.jit
def attend(
    largest, total, acc1, acc2, q1, q2,
    k_ptr, k_key, v_ptr, v_key, start, end, keys, first,
    image, head, query, batch_head, inside_rows,
    bias_ptr, bias_batch, bias_head, bias_query, bias_key, mask_ptr, mask_batch, mask_key,
    seed_ptr, drop_below, scale,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys ``start`` to ``end`` of one source.

    ``first`` is the number of the source's first key among the keys of all sources; ``scale`` is
    to base 2. The sums begin as `new_sums`.
    """
    dtype: tl.constexpr = q1.dtype
    local = tl.arange(0, BLOCK_N)
    k_local, v_local = tile_offsets(local, k_key, WIDE), tile_offsets(local, v_key, WIDE)
    for begin in range(start, end, BLOCK_N):
        n = begin + local
        inside = n < keys
        if dtype == tl.float32:  # these offsets leave more registers to fp32, others to 16 bits
            k1, k2 = load_parts(k_ptr, n.to(tl.int64) * k_key, inside, d, D1, D2)
            v1, v2 = load_parts(v_ptr, n.to(tl.int64) * v_key, inside, d, D1, D2)
        else:
            far = tl.cast(begin, tl.int64)
            k1, k2 = load_parts(k_ptr + far * k_key, k_local, inside, d, D1, D2)
            v1, v2 = load_parts(v_ptr + far * v_key, v_local, inside, d, D1, D2)
        if KEYS == 1:
            s = dot_parts(q1, q2, k1, k2, D2, PRECISION)
            s = _hide(s, begin, n, inside, keys, first, image, mask_ptr, mask_batch, mask_key)
            p, rescale, largest = exponentials(s, largest, scale, dtype)
            total = add_exponentials(rescaled(total, rescale, dtype), p, dtype)
            acc1 = tl.dot(p, v1, acc1 * rescale[:, None])
            if D2 > 0:
                acc2 = tl.dot(p, v2, acc2 * rescale[:, None])
        else:
            s, _ = score_tile(
                dot_parts(k1, k2, q1, q2, D2, PRECISION),
                n, inside, first, image, head, query, inside_rows,
                bias_ptr, bias_batch, bias_head, bias_query, bias_key,
                mask_ptr, mask_batch, mask_key, scale, LOG2_E,
            )  # fmt: skip
            p, rescale, largest, total = softmax_step(s, largest, total, dtype, 0)
            if seed_ptr is not None:  # what is left is scaled at last, in fp32
                p *= dropout_factor(seed_ptr, drop_below, 1.0, first + n, query, batch_head, 0)
            p = p.to(dtype)
            acc1 = tl.dot(tl.trans(v1), p, acc1 * rescale[None, :], input_precision=PRECISION)
            if D2 > 0:
                acc2 = tl.dot(tl.trans(v2), p, acc2 * rescale[None, :], input_precision=PRECISION)
    return largest, total, acc1, acc2
