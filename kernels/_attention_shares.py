"""What programs that share the keys of a row have found, put together in a fixed order."""

from __future__ import annotations

import functools

from ._launcher import Config, kernel
from ._sizes import cdiv
from ._triton import tl, triton

FULL_GPU = 132  # programs, as many as an H200 has multiprocessors; with fewer, keys are split
MAX_SPLITS = 16
MIN_SPLIT_KEYS = 128  # with fewer keys in a split, combining costs more than splitting saves
MIN_SPLIT_ROWS = 256  # for the same reason
FORWARD_KEYS = 64  # in a tile of the forward
BUSY = 0.43  # of its time a multiprocessor is busy with a tile, the rest it waits
COMBINING = 6.0  # tiles could be attended to while shares are allocated, launched and combined
FEW_KEYS = 320  # which one program reads faster than two and a sum
SUMMED_BY_PROGRAM = 2048  # elements
SUMMED = tl.constexpr(SUMMED_BY_PROGRAM)


@triton.jit
def log_sum_exp(largest, total):
    """The logarithm to base 2 of ``total * exp2(largest)``; +Inf where total is 0: no key is seen.

    With +Inf the probability ``exp2(score - lse)`` of every key is 0.
    """
    none = total == 0.0
    lse = largest + tl.log2(tl.where(none, 1.0, total))
    return tl.where(none, float("inf"), lse)


@kernel(Config({}, num_warps=1))
@triton.jit(do_not_specialize=["queries", "count", "splits"])
def combine_splits_kernel(
    partial_ptr,  # (splits, count, d) fp32
    stats_ptr,  # (splits, 2, count) fp32
    o_ptr,  # (batch, queries, heads, d)
    lse_ptr, low_ptr,  # (count,) fp32, as o; each or None
    heads, queries, count, splits, d: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    # One program per row (batch, head, query); it reads all splits at once.
    row = tl.program_id(0).to(tl.int64)
    split, col = tl.arange(0, SPLITS).to(tl.int64), tl.arange(0, WIDTH)
    inside = split < splits
    at = stats_ptr + split * 2 * count + row
    largest = tl.load(at, mask=inside, other=-float("inf"))
    totals = tl.load(at + count, mask=inside, other=0.0)
    overall = tl.max(largest, axis=0)
    overall = tl.where(overall == -float("inf"), 0.0, overall)
    weight = tl.exp2(largest - overall)
    total = tl.sum(weight * totals, axis=0)
    parts = tl.load(
        partial_ptr + (split * count + row)[:, None] * d + col[None, :],
        mask=inside[:, None] & (col < d)[None, :],
        other=0.0,
    )
    o = tl.sum(parts * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    image, head, query = row // queries // heads, row // queries % heads, row % queries
    at = ((image * queries + query) * heads + head) * d + col
    high = o.to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + at, high, mask=col < d)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, log_sum_exp(overall, total))
    if low_ptr is not None:
        tl.store(low_ptr + at, (o - high.to(tl.float32)).to(high.dtype), mask=col < d)


@triton.jit
def add_shares(shares_ptr, total_ptr, program, size, shares):
    """Store the program's part of the sum of shares, ``(shares, size)`` fp32."""
    at = program.to(tl.int64) * SUMMED + tl.arange(0, SUMMED)
    inside = at < size
    total = tl.zeros([SUMMED], tl.float32)
    for _ in range(shares):
        total += tl.load(shares_ptr + at, mask=inside, other=0.0)
        shares_ptr += size
    tl.store(total_ptr + at, total.to(total_ptr.dtype.element_ty), mask=inside)


@kernel(Config({}, num_warps=4))
@triton.jit(do_not_specialize=["shares"])
def add_shares_kernel(shares_ptr, total_ptr, size, shares):
    add_shares(shares_ptr, total_ptr, tl.program_id(0), size, shares)


def summing_programs(size: int) -> int:
    """The number of programs that `add_shares` needs."""
    return cdiv(size, SUMMED_BY_PROGRAM)


def key_splits(programs: int, keys: int, held: int = 1) -> int:
    """The number of programs that share the keys of a row. It depends on nothing but shapes.

    Together they fill the GPU with ``held`` programs a multiprocessor.
    """
    return max(1, min(FULL_GPU * held // programs, keys // MIN_SPLIT_KEYS, MAX_SPLITS))


@functools.lru_cache(maxsize=4096)
def forward_splits(programs: int, keys: int, held: int) -> int:
    """The number of programs that share the keys of a row in the forward with ``[rows, keys]``.

    That which takes the least time by an estimate, if each multiprocessor has room for ``held``
    programs. The unit is the time of one tile of a program that has a multiprocessor to itself.
    """
    tiles = cdiv(keys, FORWARD_KEYS)

    def time(splits: int) -> float:
        at_once = cdiv(programs * splits, FULL_GPU)
        return cdiv(tiles, splits) * max(1.0, at_once * BUSY) + COMBINING * (splits > 1)

    most = max(1, min(FULL_GPU * held // programs, tiles, MAX_SPLITS))
    return min(range(1, most + 1), key=time)


def gradient_splits(programs: int, keys: int, keys2: int, held: int) -> tuple[int, int]:
    """The numbers of programs that share the first and the second source's keys in backward.

    Together they fill the GPU with ``held`` programs a multiprocessor, but few keys are not split.
    """
    most = min(FULL_GPU * held // programs, (keys + keys2) // MIN_SPLIT_KEYS, MAX_SPLITS)
    splits = most if keys + keys2 > FEW_KEYS else 1
    splits2 = 0 if keys2 == 0 else max(1, splits * keys2 // (keys + keys2))
    return max(1, splits - splits2), splits2


def row_splits(programs: int, rows: int) -> int:
    """The number of programs that share the rows that see a tile of keys."""
    return max(1, min(2 * FULL_GPU // programs, rows // MIN_SPLIT_ROWS, MAX_SPLITS))
