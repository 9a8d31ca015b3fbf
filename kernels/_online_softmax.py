"""The online softmax (arXiv 1805.02867) over tiles ``[rows, keys]`` of unscaled scores.

Its scale is positive and to base 2. In 16 bits a product with ones sums the exponentials, as
rounded for the product with the values. So the result is an exact mean of the values, and no
exponential is converted back. Such a sum has COLUMNS equal columns; in fp32 it has none.
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
def exponentials(s, largest, scale, dtype: tl.constexpr):
    """The exponentials ``exp2(scale * s - largest)`` of a tile of scores.

    Returns:
        The exponentials in ``dtype``, the factor that rescales earlier sums and the largest scaled
        score so far.
    """
    new_largest = tl.maximum(largest, tl.max(s, axis=1) * scale)
    shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)  # no key seen yet
    p = tl.exp2(s * scale - shift[:, None])
    return p.to(dtype), tl.exp2(largest - shift), new_largest


@triton.jit
def rescaled(total, rescale, dtype: tl.constexpr):
    """The sums of exponentials, rescaled."""
    return total * (rescale if dtype == tl.float32 else rescale[:, None])


@triton.jit
def add_exponentials(total, p, dtype: tl.constexpr):
    """Add the exponentials of a tile to the sums."""
    if dtype == tl.float32:
        total += tl.sum(p, axis=1)
    else:
        total = tl.dot(p, tl.full([p.shape[1], COLUMNS], 1.0, dtype), total)
    return total
