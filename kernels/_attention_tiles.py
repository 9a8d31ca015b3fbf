"""Tile operations that the forward and backward kernels of attention share.

A program holds a tile of rows: the queries of all heads that share a key head. Row ``r`` of a key
head is query ``r % queries`` of head ``r // queries`` of its group. `cross_attention` holds its
scores transposed, ``[keys, rows]``: the long side of the tensor cores takes the keys, and the few
queries are the short side, which needs no padding. A head size that is not a power of two is split
into two parts, each with a matrix product of its own: 80 = 64 + 16 is not padded to 128.
"""

from __future__ import annotations

import math

from torch import Tensor

from ._dropout import keep_tile
from ._triton import tl, triton

LOG2_OF_E = math.log2(math.e)
LOG2_E = tl.constexpr(LOG2_OF_E)
# Arguments that vary from call to call. By default Triton would compile further variants for the
# value 1 and for multiples of 16.
SIZES = ("kv_heads", "queries", "rows", "keys", "count", "drop_below")


@triton.jit
def addresses(ptr, row, col):
    """The addresses of columns in rows at offsets ``row``; offsets in int32 are added in int32."""
    if row.dtype == tl.int32:
        return ptr + (row[:, None] + col[None, :])
    return ptr + row[:, None] + col[None, :]


@triton.jit
def load_part(ptr, row, inside, first: tl.constexpr, d: tl.constexpr, D: tl.constexpr):
    """Load D columns from ``first`` on of the rows at offsets ``row``; zeros beyond column d."""
    col = first + tl.arange(0, D)
    at = addresses(ptr, row, col)
    mask = inside[:, None] & (col < d)[None, :] if d < first + D else inside[:, None]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def store_part(ptr, row, inside, x, first: tl.constexpr, d: tl.constexpr, D: tl.constexpr):
    """Store what `load_part` loads, in the pointer's dtype."""
    col = first + tl.arange(0, D)
    at = addresses(ptr, row, col)
    mask = inside[:, None] & (col < d)[None, :] if d < first + D else inside[:, None]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_parts(
    ptr, row, inside, d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr
):  # fmt: skip
    """Load rows as two parts, ``[rows, D1]`` and ``[rows, D2]``; D2 = 0: the second is unused."""
    x1 = load_part(ptr, row, inside, 0, d, D1)
    x2 = x1
    if D2 > 0:
        x2 = load_part(ptr, row, inside, D1, d, D2)
    return x1, x2


@triton.jit
def store_parts(
    ptr, row, inside, x1, x2, d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr
):  # fmt: skip
    """Store rows from the two parts that `load_parts` returns."""
    store_part(ptr, row, inside, x1, 0, d, D1)
    if D2 > 0:
        store_part(ptr, row, inside, x2, D1, d, D2)


@triton.jit
def load_vector_parts(ptr, d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Load a vector ``(d,)``, such as the weight of a norm, in fp32 as two parts."""
    col = tl.arange(0, D1)
    w1 = tl.load(ptr + col, mask=col < d, other=0.0).to(tl.float32)
    w2 = w1
    if D2 > 0:
        col = D1 + tl.arange(0, D2)
        w2 = tl.load(ptr + col, mask=col < d, other=0.0).to(tl.float32)
    return w1, w2


@triton.jit
def divide_by_rms(x1, x2, inside, eps, d: tl.constexpr, D2: tl.constexpr):
    """Divide rows by their root mean square (arXiv 1910.07467), in fp32; return 1 / rms too."""
    x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
    square = tl.sum(x1 * x1, axis=1)
    if D2 > 0:
        square += tl.sum(x2 * x2, axis=1)
    inverse = tl.where(inside, 1.0 / tl.sqrt(square / d + eps), 0.0)
    return x1 * inverse[:, None], x2 * inverse[:, None], inverse


@triton.jit
def rms_norm(
    x1, x2, inside, weight_ptr, eps, d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr
):  # fmt: skip
    """RMS norm of rows. They are rounded before they are multiplied by the weight, as in Llama."""
    w1, w2 = load_vector_parts(weight_ptr, d, D1, D2)
    unit1, unit2, _ = divide_by_rms(x1, x2, inside, eps, d, D2)
    normed1 = (unit1.to(x1.dtype).to(tl.float32) * w1[None, :]).to(x1.dtype)
    normed2 = normed1
    if D2 > 0:
        normed2 = (unit2.to(x1.dtype).to(tl.float32) * w2[None, :]).to(x1.dtype)
    return normed1, normed2


@triton.jit
def rms_norm_backward(
    x1, x2, dy1, dy2, inside, weight_ptr, dweight_ptr, eps,
    d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """Return the gradient of the rows; store the weight's gradient, summed over the rows."""
    w1, w2 = load_vector_parts(weight_ptr, d, D1, D2)
    unit1, unit2, inverse = divide_by_rms(x1, x2, inside, eps, d, D2)
    col = tl.arange(0, D1)
    dw1 = tl.sum(dy1 * unit1.to(x1.dtype).to(tl.float32), axis=0)
    tl.store(dweight_ptr + col, dw1, mask=col < d)
    dy1 *= w1[None, :]
    projection = tl.sum(dy1 * unit1, axis=1)
    if D2 > 0:
        col = D1 + tl.arange(0, D2)
        dw2 = tl.sum(dy2 * unit2.to(x1.dtype).to(tl.float32), axis=0)
        tl.store(dweight_ptr + col, dw2, mask=col < d)
        dy2 *= w2[None, :]
        projection += tl.sum(dy2 * unit2, axis=1)
    projection = (projection / d)[:, None]
    dx1, dx2 = (dy1 - unit1 * projection) * inverse[:, None], dy2
    if D2 > 0:
        dx2 = (dy2 - unit2 * projection) * inverse[:, None]
    return dx1, dx2


@triton.jit
def dot_parts(a1, a2, b1, b2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """The matrix product ``a b^T``, summed over both parts."""
    product = tl.dot(a1, tl.trans(b1), input_precision=PRECISION)
    if D2 > 0:
        product = tl.dot(a2, tl.trans(b2), product, input_precision=PRECISION)
    return product


@triton.jit
def score_tile(
    product, n, inside, first, image, head, query, inside_rows,
    bias_ptr, bias_batch, bias_head, bias_query, bias_key,
    mask_ptr, mask_batch, mask_key, scale, bias_scale,
):  # fmt: skip
    """Scores ``[keys, rows]``: scaled and biased products, -Inf for masked keys; and the mask.

    ``first`` is the number of the source's first key among the keys of all sources.
    """
    s = product * scale
    key = (first + n).to(tl.int64)
    if bias_ptr is not None:
        row = image * bias_batch + head * bias_head + query * bias_query
        at = bias_ptr + row[None, :] + (key * bias_key)[:, None]
        bias = tl.load(at, mask=inside[:, None] & inside_rows[None, :], other=0.0)
        s += bias.to(tl.float32) * bias_scale
    seen = inside
    if mask_ptr is not None:
        at = mask_ptr + image * mask_batch + key * mask_key
        seen = tl.load(at, mask=inside, other=0) != 0
    return tl.where(seen[:, None], s, -float("inf")), seen


@triton.jit
def softmax_step(s, largest, total, dtype: tl.constexpr, KEYS: tl.constexpr):
    """One step of the online softmax (arXiv 1805.02867); axis KEYS of the tile holds the keys.

    The scores are to base 2: a key's probability is ``exp2(s)`` over the sum of all. Returns the
    exponentials of the tile, the factor that rescales earlier sums, the largest score so far and
    the sum of exponentials so far. They are summed as rounded to ``dtype``, in which the values are
    multiplied by them, so that the result is an exact mean of the values.
    """
    new_largest = tl.maximum(largest, tl.max(s, axis=KEYS))
    shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)  # no key seen yet
    p = tl.exp2(s - tl.expand_dims(shift, KEYS))
    rescale = tl.exp2(largest - shift)
    total = total * rescale + tl.sum(p.to(dtype).to(tl.float32), axis=KEYS)
    return p, rescale, new_largest, total


@triton.jit
def kahan_add(total, error, term):
    """One step of Kahan summation: ``total + term``, and its rounding error.

    The next step subtracts the error from its term.
    """
    term -= error
    new_total = total + term
    error = (new_total - total) - term
    return new_total, tl.where(tl.abs(error) < float("inf"), error, 0.0)  # Inf - Inf is NaN


@triton.jit
def mean_step(
    s, dp, largest, total, pivot, excess, total_error, excess_error, dtype: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """One online step of ``sum(softmax(s) * dp)``, the mean of dp; axis KEYS holds the keys.

    State: the largest score, the sum of exponentials, ``pivot`` (dp at the largest score), and
    ``excess``, the sum of ``exp(s - largest) * (dp - pivot)``; the mean is ``pivot + excess /
    total``. In fp32 both sums are Kahan sums. Plain sums over thousands of keys would be most of
    the error of dq: an error of the mean shifts dq by a multiple of the mean key, and that
    is nearly parallel to q.
    """
    tile_largest = tl.max(s, axis=KEYS)
    new_pivot = tl.max(
        tl.where(s == tl.expand_dims(tile_largest, KEYS), dp, -float("inf")), axis=KEYS
    )
    new_pivot = tl.where(
        (tile_largest > largest) & (tl.abs(new_pivot) < float("inf")), new_pivot, pivot
    )
    new_largest = tl.maximum(largest, tile_largest)
    shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)  # no key seen yet
    e = tl.exp2((s - tl.expand_dims(shift, KEYS)) * LOG2_E)
    rescale = tl.exp2((largest - shift) * LOG2_E)
    total *= rescale
    excess = excess * rescale + total * (pivot - new_pivot)
    tile_excess = tl.sum(e * (dp - tl.expand_dims(new_pivot, KEYS)), axis=KEYS)
    tile_total = tl.sum(e, axis=KEYS)
    if dtype == tl.float32:
        total_error *= rescale
        excess_error = excess_error * rescale + total_error * (pivot - new_pivot)
        excess, excess_error = kahan_add(excess, excess_error, tile_excess)
        total, total_error = kahan_add(total, total_error, tile_total)
    else:
        excess += tile_excess
        total += tile_total
    return new_largest, total, new_pivot, excess, total_error, excess_error


@triton.jit
def probabilities_and_score_gradients(
    s, scored, inside, dp, factor, largest, inverse, pivot, delta, dtype, KEYS: tl.constexpr
):  # fmt: skip
    """A tile of p after dropout and of ds, in ``dtype`` for the matrix products that follow.

    ``scored`` marks the scores that have a gradient, ``inside`` the rows that exist. In fp32
    ``delta`` is the mean of dp minus ``pivot``, else it is the mean itself.
    """
    inside = tl.expand_dims(inside, KEYS)
    p = tl.exp2((s - tl.expand_dims(largest, KEYS)) * LOG2_E) * tl.expand_dims(inverse, KEYS)
    if dtype == tl.float32:
        dp -= tl.expand_dims(pivot, KEYS)
    ds = p * (dp - tl.expand_dims(delta, KEYS))
    ds = tl.where(scored & inside, ds, 0.0)  # 0 even if p is NaN
    p = tl.where(inside, p * factor, 0.0)  # a row past the last has 0 * Inf = NaN
    return p.to(dtype), ds.to(dtype)


@triton.jit
def dropout_factor(
    seed_ptr, drop_below, survivor_scale, key, query, batch_head, KEYS: tl.constexpr
):  # fmt: skip
    """The factor of the probabilities: 0, or 1 / (1 - dropout); axis KEYS holds the keys.

    ``batch_head`` is ``image * heads + head``.
    """
    keep = keep_tile(
        tl.load(seed_ptr), tl.expand_dims(key, 1 - KEYS),
        tl.expand_dims(query.to(tl.int32), KEYS), tl.expand_dims(batch_head.to(tl.int32), KEYS),
        drop_below,
    )  # fmt: skip
    return keep * survivor_scale


def strides(x: Tensor | None, count: int = 3) -> tuple[int, ...]:
    """The first strides of a tensor, zeros for None."""
    return x.stride()[:count] if x is not None else (0,) * count
