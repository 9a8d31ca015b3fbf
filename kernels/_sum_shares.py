"""Gradients of parameters, which are sums over rows that many programs share.

A program of a backward kernel sums over its own rows and writes this share of each gradient to its
own row of a buffer. One more launch adds the shares of all parameters in a fixed order, without
atomics, and stores each gradient in its own dtype. A kernel with one program stores the gradients
itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launcher import Config, kernel
from ._triton import tl, triton

MAX_PROGRAMS = 264  # that share the rows: two per multiprocessor of an H200
MOST_GRADIENTS = 4  # that one launch sums
ALIGNMENT = 16  # columns; Triton's wide accesses need strides that are a multiple of it


def split_rows(rows: int, least: int, wide: bool = False) -> tuple[int, int]:
    """Return the rows of a program and the number of programs.

    Programs take an equal number of rows, ``least`` or more. Up to eight times as many all go to
    one program, which saves the launch of `sum_shares`. Of programs with ``wide`` rows only one
    fits on a multiprocessor.
    """
    if rows <= 8 * least:
        return rows, 1
    rows_per_program = max(least, -(-rows // (MAX_PROGRAMS // 2 if wide else MAX_PROGRAMS)))
    return rows_per_program, -(-rows // rows_per_program)


def new_shares(programs: int, *gradients: Tensor | None) -> tuple[Tensor | None, int]:
    """Return memory for the shares of gradients, ``(programs, cols)`` fp32, and its row stride.

    The columns of the gradients follow each other, and then some unused ones, so that rows can be
    read and written in 128 bits. None if there are no gradients or only one program.
    """
    wanted = [gradient for gradient in gradients if gradient is not None]
    if programs == 1 or not wanted:
        return None, 0
    cols = -(-sum([gradient.numel() for gradient in wanted]) // ALIGNMENT) * ALIGNMENT
    return wanted[0].new_empty(programs, cols, dtype=torch.float32), cols


@triton.jit
def store_share(gradient_ptr, shares_ptr, at, share, col, inside):
    """Store a program's share of a gradient at ``at + col``; without shares it is the gradient."""
    if shares_ptr is None:
        tl.store(gradient_ptr + col, share.to(gradient_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(shares_ptr + at + col, share.to(tl.float32), mask=inside)


@triton.jit
def _store_columns(ptr, cols, total, col, IS_ZERO: tl.constexpr):
    if ptr is not None:
        if IS_ZERO:
            total *= 0.0  # NaN stays NaN
        tl.store(ptr + col, total.to(ptr.dtype.element_ty), mask=(col >= 0) & (col < cols))


# The first config loads all shares of the norms' backwards at once. The second is for thousands of
# shares: fewer columns, so more programs.
@kernel(
    Config({"BLOCK_ROWS": 512, "BLOCK_COLS": 32}, num_warps=8),
    Config({"BLOCK_ROWS": 512, "BLOCK_COLS": 16}, num_warps=8),
    choose=lambda count: int(count > 1024),
)
@triton.jit(do_not_specialize=["count", "cols_1", "cols_2", "cols_3", "cols_4"])
def sum_shares_kernel(
    shares_ptr, shares_row,  # (count, cols) at this row stride
    gradient_1_ptr, gradient_2_ptr, gradient_3_ptr, gradient_4_ptr,  # or None
    cols_1, cols_2, cols_3, cols_4,
    count, cols, ZERO: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    first = (tl.program_id(0).to(tl.int64) * BLOCK_COLS).to(tl.int32)
    col = first + tl.arange(0, BLOCK_COLS)
    inside_cols = col < cols
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.float32)
    for start in range(0, count, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        at = shares_ptr + row.to(tl.int64)[:, None] * shares_row + col[None, :]
        inside = (row < count)[:, None] & inside_cols[None, :]
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(total, axis=0)
    _store_columns(gradient_1_ptr, cols_1, total, col, ZERO == 0)
    col -= cols_1
    _store_columns(gradient_2_ptr, cols_2, total, col, ZERO == 1)
    col -= cols_2
    _store_columns(gradient_3_ptr, cols_3, total, col, ZERO == 2)
    col -= cols_3
    _store_columns(gradient_4_ptr, cols_4, total, col, ZERO == 3)


def sum_shares(shares: Tensor | None, *gradients: Tensor | None, zero: int | None = None) -> None:
    """Fill gradients, at most four, with the sums of their shares.

    shares: ``(count, cols)``, inner stride 1: the columns of the gradients in their order, then any
    others. None if a single program has filled the gradients. gradients: contiguous, of any dtypes;
    None has no columns. ``zero`` is the index of a gradient whose terms cancel exactly; rounding
    errors of its sum are dropped.
    """
    if shares is None:
        return
    sizes = [0 if gradient is None else gradient.numel() for gradient in gradients]
    absent = MOST_GRADIENTS - len(sizes)
    count, cols = shares.shape
    sum_shares_kernel(
        lambda blocks: (-(-cols // blocks["BLOCK_COLS"]),),
        shares, shares.stride(0), *gradients, *[None] * absent, *sizes, *[0] * absent,
        count, cols, zero, size=count,
    )  # fmt: skip
