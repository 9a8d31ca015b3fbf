"""What the forward and the backward kernels of attention have in common.

Scores are held transposed, keys by queries: the tensor cores' long side takes the keys, and the few
queries are its short side, which need not be padded. Heads that share keys are packed: row ``r`` of
a key head is head ``r // queries`` of its group, query ``r % queries``. A head size that is no
power of two is two parts, each a product of its own: 80 = 64 + 16 is not padded to 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dropout import kept
from ._triton import tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)
SIZES = ("kv_heads", "queries", "rows", "keys", "count", "drop_below")  # differ from call to call


@triton.jit
def load_parts(
    ptr, row, inside, d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr
):  # fmt: skip
    """The columns of some rows, ``[rows, D1]`` and ``[rows, D2]`` (D2 = 0: anything)."""
    col = tl.arange(0, D1)
    at = ptr + row[:, None] + col[None, :]
    if d < D1:
        x1 = tl.load(at, mask=inside[:, None] & (col < d)[None, :], other=0.0)
    else:
        x1 = tl.load(at, mask=inside[:, None], other=0.0)
    x2 = x1
    if D2 > 0:
        col = D1 + tl.arange(0, D2)
        at = ptr + row[:, None] + col[None, :]
        if d < D1 + D2:
            x2 = tl.load(at, mask=inside[:, None] & (col < d)[None, :], other=0.0)
        else:
            x2 = tl.load(at, mask=inside[:, None], other=0.0)
    return x1, x2


@triton.jit
def store_parts(
    ptr, row, inside, x1, x2, d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr
):  # fmt: skip
    col = tl.arange(0, D1)
    mask = inside[:, None] & (col < d)[None, :] if d < D1 else inside[:, None]
    tl.store(ptr + row[:, None] + col[None, :], x1.to(ptr.dtype.element_ty), mask=mask)
    if D2 > 0:
        col = D1 + tl.arange(0, D2)
        mask = inside[:, None] & (col < d)[None, :] if d < D1 + D2 else inside[:, None]
        tl.store(ptr + row[:, None] + col[None, :], x2.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_head(ptr, d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """One number for each column of a head, fp32 in two parts."""
    col = tl.arange(0, D1)
    w1 = tl.load(ptr + col, mask=col < d, other=0.0).to(tl.float32)
    w2 = w1
    if D2 > 0:
        col = D1 + tl.arange(0, D2)
        w2 = tl.load(ptr + col, mask=col < d, other=0.0).to(tl.float32)
    return w1, w2


@triton.jit
def over_root_mean_square(x1, x2, inside, eps, d: tl.constexpr, D2: tl.constexpr):
    """Rows in fp32 over their root mean square (arXiv 1910.07467), and its inverse."""
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
    """Rows normed, rounded, and then times a weight, as Llama does."""
    w1, w2 = load_head(weight_ptr, d, D1, D2)
    unit1, unit2, _ = over_root_mean_square(x1, x2, inside, eps, d, D2)
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
    """The gradient of the rows; that of the weight, summed over them, is stored."""
    w1, w2 = load_head(weight_ptr, d, D1, D2)
    unit1, unit2, inverse = over_root_mean_square(x1, x2, inside, eps, d, D2)
    col = tl.arange(0, D1)
    dw1 = tl.sum(dy1 * unit1.to(x1.dtype).to(tl.float32), axis=0)
    tl.store(dweight_ptr + col, dw1, mask=col < d)
    dy1 *= w1[None, :]
    along = tl.sum(dy1 * unit1, axis=1)
    if D2 > 0:
        col = D1 + tl.arange(0, D2)
        dw2 = tl.sum(dy2 * unit2.to(x1.dtype).to(tl.float32), axis=0)
        tl.store(dweight_ptr + col, dw2, mask=col < d)
        dy2 *= w2[None, :]
        along += tl.sum(dy2 * unit2, axis=1)
    along = (along / d)[:, None]
    dx1, dx2 = (dy1 - unit1 * along) * inverse[:, None], dy2
    if D2 > 0:
        dx2 = (dy2 - unit2 * along) * inverse[:, None]
    return dx1, dx2


@triton.jit
def inner_product(a1, a2, b1, b2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """``a b^T`` over both parts."""
    product = tl.dot(a1, tl.trans(b1), input_precision=PRECISION)
    if D2 > 0:
        product = tl.dot(a2, tl.trans(b2), product, input_precision=PRECISION)
    return product


@triton.jit
def score_tile(
    product, n, inside, first, image, head, query, inside_rows,
    bias_ptr, bias_batch, bias_head, bias_query, bias_key,
    mask_ptr, mask_batch, mask_key, scale,
):  # fmt: skip
    """Scores ``[keys, rows]`` from the products, -Inf where a key is not seen; and the seen."""
    s = product * scale
    key = (first + n).to(tl.int64)
    if bias_ptr is not None:
        row = image * bias_batch + head * bias_head + query * bias_query
        at = bias_ptr + row[None, :] + (key * bias_key)[:, None]
        bias = tl.load(at, mask=inside[:, None] & inside_rows[None, :], other=0.0)
        s += bias.to(tl.float32)
    seen = inside
    if mask_ptr is not None:
        at = mask_ptr + image * mask_batch + key * mask_key
        seen = tl.load(at, mask=inside, other=0) != 0
    return tl.where(seen[:, None], s, -float("inf")), seen


@triton.jit
def softmax_step(s, largest, total, KEYS: tl.constexpr):
    """Online softmax over a tile of scores whose axis KEYS is of keys (arXiv 1805.02867).

    Gives its exponentials, what earlier sums shrink by, the largest score and the sum so far.
    """
    larger = tl.maximum(largest, tl.max(s, axis=KEYS))
    shift = tl.where(larger == -float("inf"), 0.0, larger)  # no key seen yet
    p = tl.exp2((s - tl.expand_dims(shift, KEYS)) * LOG2_E)
    shrunk = tl.exp2((largest - shift) * LOG2_E)
    return p, shrunk, larger, total * shrunk + tl.sum(p, axis=KEYS)


@triton.jit
def _added(total, lost, term):
    """Kahan's sum: ``total + term``, and what its rounding lost, to be taken off the next term."""
    term -= lost
    larger = total + term
    lost = (larger - total) - term
    return larger, tl.where(tl.abs(lost) < float("inf"), lost, 0.0)  # Inf - Inf is no loss


@triton.jit
def mean_step(
    s, dp, largest, total, pivot, beyond, lost_total, lost_beyond, dtype: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """A step of the mean of dp under the softmax of s, tiles whose axis KEYS is of keys.

    Largest score, sum of exponentials, dp at the largest score, and the sum of what dp is beyond
    that, weighted by the exponentials; in fp32 also what these two sums lost to rounding. Over
    thousands of keys that would be most of the error of dq: an error of the mean moves dq along
    the mean of k, which lies along q.
    """
    here = tl.max(s, axis=KEYS)
    there = tl.max(tl.where(s == tl.expand_dims(here, KEYS), dp, -float("inf")), axis=KEYS)
    there = tl.where((here > largest) & (tl.abs(there) < float("inf")), there, pivot)
    larger = tl.maximum(largest, here)
    shift = tl.where(larger == -float("inf"), 0.0, larger)  # no key seen yet
    e = tl.exp2((s - tl.expand_dims(shift, KEYS)) * LOG2_E)
    shrunk = tl.exp2((largest - shift) * LOG2_E)
    total *= shrunk
    beyond = beyond * shrunk + total * (pivot - there)
    more_beyond = tl.sum(e * (dp - tl.expand_dims(there, KEYS)), axis=KEYS)
    more = tl.sum(e, axis=KEYS)
    if dtype == tl.float32:
        lost_total *= shrunk
        lost_beyond = lost_beyond * shrunk + lost_total * (pivot - there)
        beyond, lost_beyond = _added(beyond, lost_beyond, more_beyond)
        total, lost_total = _added(total, lost_total, more)
    else:
        beyond += more_beyond
        total += more
    return larger, total, there, beyond, lost_total, lost_beyond


@triton.jit
def probabilities_and_score_gradients(
    s, scored, inside, dp, factor, largest, inverse, pivot, delta, dtype, KEYS: tl.constexpr
):  # fmt: skip
    """A tile of p after dropout and of ds, as the dots to come take them.

    ``scored``: where the scores have a gradient; ``inside``: rows that are there.
    """
    inside = tl.expand_dims(inside, KEYS)
    p = tl.exp2((s - tl.expand_dims(largest, KEYS)) * LOG2_E) * tl.expand_dims(inverse, KEYS)
    if dtype == tl.float32:
        dp -= tl.expand_dims(pivot, KEYS)
    ds = p * (dp - tl.expand_dims(delta, KEYS))
    ds = tl.where(scored & inside, ds, 0.0)  # 0 even if p is NaN
    p = tl.where(inside, p * factor, 0.0)  # rows beyond the last: 0 * Inf is NaN
    return p.to(dtype), ds.to(dtype)


@triton.jit
def dropout_factor(seed_ptr, drop_below, survivor_scale, key, query, row):
    """What the probabilities ``[keys, rows]`` are multiplied by; ``row``: of all heads' images."""
    survives = kept(
        tl.load(seed_ptr), key[:, None], query.to(tl.int32)[None, :], row.to(tl.int32)[None, :],
        drop_below,
    )  # fmt: skip
    return survives * survivor_scale


def head_parts(d: int) -> tuple[int, int]:
    """The widths of the two parts of a head."""
    first = max(16, 1 << (d.bit_length() - 1))
    return first, 0 if d <= first else max(16, triton.next_power_of_2(d - first))


def shrink(q: Tensor) -> int:
    """What a tile's number of keys is divided by: it is for 64 columns of 16 bits.

    In fp32, whose products are sums of scalars in registers, by twice as much as the bytes grow.
    """
    columns = triton.next_power_of_2(sum(head_parts(q.shape[3])))
    return max(1, columns // 64) * (4 if q.dtype == torch.float32 else 1)


def row_block(q: Tensor, rows: int) -> int:
    """The rows of a tile: with 64, registers overflow on some GPU."""
    return 16 if rows <= 16 or q.dtype == torch.float32 else 32


def strides(x: Tensor | None, count: int = 3) -> tuple[int, ...]:
    return x.stride()[:count] if x is not None else (0,) * count


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None else mask.view(torch.uint8)


def score_strides(bias: Tensor | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of the bias, 0 where it is broadcast."""
    if bias is None:
        return (0,) * 4
    return tuple(
        0 if n == 1 and size != 1 else s
        for n, size, s in zip(bias.shape, shape, bias.stride(), strict=True)
    )
