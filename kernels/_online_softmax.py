"""The online softmax (arXiv 1805.02867) over tiles ``[rows, keys]`` of unscaled scores.

In 16 bits a product with ones sums the exponentials, as rounded for the product with the values. So
the result is an exact mean of the values, and no exponential is converted back. Such a sum has
COLUMNS equal columns; in fp32 it has none.
"""

from __future__ import annotations

from ._triton import tl, triton

COLUMNS = tl.constexpr(16)  # the narrowest product
LEAST_SCALE = 1e-30  # of scores: with 0 a hidden score of -Inf would be NaN


@triton.jit
def empty_sums(BLOCK_M: tl.constexpr, dtype: tl.constexpr):
    """The largest scores and the sums of exponentials of rows that have seen no key."""
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M] if dtype == tl.float32 else [BLOCK_M, COLUMNS], tl.float32)
    return largest, total


@triton.jit
def one_column(total, dtype: tl.constexpr):
    """The sums of exponentials of rows, ``[rows]``."""
    return total if dtype == tl.float32 else tl.max(total, axis=1)


@triton.jit
def add_scores(s, largest, total, scale, dtype: tl.constexpr):
    """Add a tile of scores, whose exponentials are ``exp2(scale * s)``.

    Returns:
        The exponentials in ``dtype``, the factor that rescales earlier sums, the largest unscaled
        score and the sum of exponentials so far.
    """
    new_largest = tl.maximum(largest, tl.max(s, axis=1))
    shift = tl.where(new_largest == -float("inf"), 0.0, new_largest * scale)  # no key seen yet
    p = tl.exp2(s * scale - shift[:, None])
    rescale = tl.exp2(largest * scale - shift)
    if dtype == tl.float32:
        total = total * rescale + tl.sum(p, axis=1)
    else:
        p = p.to(dtype)
        ones = tl.full([s.shape[1], COLUMNS], 1.0, dtype)
        total = tl.dot(p, ones, total * rescale[:, None])
    return p, rescale, new_largest, total
