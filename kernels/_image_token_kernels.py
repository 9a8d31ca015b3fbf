"""Kernels that move rows between image features and the image tokens of a text sequence.

A program takes a block of consecutive positions. It finds the feature row of its first image token
by counting the true entries of the mask before it. So one launch is enough, no table is computed or
allocated, and the result does not depend on the number of programs. A program reads half of the
mask on average, from the cache: at 8 x 2944 x 4096 in bf16 all of them together read 6 MB of it,
and move 386 MB.
"""

from __future__ import annotations

from ._launcher import Config, kernel
from ._triton import tl, triton

BLOCK_ROWS = 2
COPY = Config({"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLS": 4096, "BLOCK_MASK": 4096}, num_warps=8,
              asserts=True)  # fmt: skip


@triton.jit
def count_true(mask_ptr, begin, end, BLOCK: tl.constexpr):
    """The number of true entries in ``mask[begin:end]``."""
    lane = tl.arange(0, BLOCK)
    rest = end - (end - begin) % BLOCK
    at = rest + lane
    partial = tl.load(mask_ptr + at, mask=at < end, other=0).to(tl.int32)
    for start in range(begin, rest, BLOCK):  # whole blocks, in loads of 16 bytes
        partial += tl.load(mask_ptr + start + lane).to(tl.int32)
    return tl.sum(partial)


@triton.jit
def unless_idle(mask_ptr, begin, end, rows, BLOCK_MASK: tl.constexpr):
    """The range, or an empty one if none of its entries is true; the last range stays as it is."""
    is_idle = (end < rows) & (count_true(mask_ptr, begin, end, BLOCK_MASK) == 0)
    return tl.where(is_idle, 0, begin), tl.where(is_idle, 0, end)


@triton.jit
def number_image_tokens(mask_ptr, start, end, found, BLOCK_ROWS: tl.constexpr):
    """Number the true entries of a few rows from ``found`` on; -1 for others. Also the next number.

    The entries are loaded one by one, so that warps need not exchange them.
    """
    lane = tl.arange(0, BLOCK_ROWS)
    number = tl.full([BLOCK_ROWS], -1, dtype=tl.int32)
    for i in tl.static_range(BLOCK_ROWS):
        is_image = tl.load(mask_ptr + start + i, mask=start + i < end, other=0).to(tl.int32)
        number = tl.where((lane == i) & (is_image != 0), found, number)
        found += is_image
    return number, found


@kernel(COPY)
@triton.jit(
    do_not_specialize=[
        "rows", "sequence", "rows_per_program", "first", "feature_rows", "count", "limit",
    ]
)  # fmt: skip
def merge_image_tokens_kernel(
    text_ptr, text_batch_stride, text_stride,  # (batch, sequence, cols) or None: zeros
    features_ptr, features_stride,  # (limit, cols) or None
    index_ptr,  # (feature_rows,) int32 or None: the features' row for each image token
    fill_ptr,  # (cols,) or None: for image tokens whose index is no row, else zeros
    mask_ptr,  # (rows,)
    out_ptr,  # (rows, cols)
    positions_ptr,  # (feature_rows,) int32 or None: takes the row of each image token
    rows, sequence, cols, rows_per_program, first, feature_rows, count, limit,
    WRITE_TEXT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_MASK: tl.constexpr,
):  # fmt: skip
    # Takes the image tokens [first, first + feature_rows) of the `count` that there should be.
    begin = tl.program_id(0).to(tl.int64) * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    if not WRITE_TEXT:
        begin, end = unless_idle(mask_ptr, begin, end, rows, BLOCK_MASK)
    found = count_true(mask_ptr, 0, begin, BLOCK_MASK)
    for start in range(begin, end, BLOCK_ROWS):
        number, found = number_image_tokens(mask_ptr, start, end, found, BLOCK_ROWS)
        row = start + tl.arange(0, BLOCK_ROWS)
        feature = number.to(tl.int64) - first
        is_image = (number >= 0) & (feature >= 0) & (feature < feature_rows)
        # An image token beyond the last feature row keeps the text; the assertion below fails.
        is_text = (row < end) & ((number < 0) | (number >= count))
        is_row = is_image
        if positions_ptr is not None:
            tl.store(positions_ptr + feature, row.to(tl.int32), mask=is_image)
        if index_ptr is not None:
            feature = tl.load(index_ptr + feature, mask=is_image, other=-1).to(tl.int64)
            is_row = is_image & (feature >= 0) & (feature < limit)
        at = out_ptr + row[:, None] * cols
        text = row // sequence * text_batch_stride + row % sequence * text_stride
        for left in range(0, cols, BLOCK_COLS):
            col = (left + tl.arange(0, BLOCK_COLS))[None, :]
            inside = col < cols
            if WRITE_TEXT:
                x = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=out_ptr.dtype.element_ty)
                copied = is_text[:, None] & inside
                if text_ptr is not None:
                    x = tl.load(text_ptr + text[:, None] + col, mask=copied)
                tl.store(at + col, x, mask=copied)
            if features_ptr is not None:
                copied = is_row[:, None] & inside
                y = tl.load(
                    features_ptr + feature[:, None] * features_stride + col, mask=copied, other=0.0
                )
                if fill_ptr is None:
                    copied = is_image[:, None] & inside
                tl.store(at + col, y.to(out_ptr.dtype.element_ty), mask=copied)
            if fill_ptr is not None:
                copied = (is_image & (is_row == 0))[:, None] & inside
                y = tl.load(fill_ptr + col + tl.zeros_like(row)[:, None], mask=copied)
                y = y.to(features_ptr.dtype.element_ty).to(out_ptr.dtype.element_ty)
                tl.store(at + col, y, mask=copied)
    if text_ptr is not None:  # without text this is the gradient of a gather, which has asserted it
        assert (end < rows) | (found == count), "image_mask has another count than rows of features"


@kernel(COPY)
@triton.jit(
    do_not_specialize=["rows", "sequence", "rows_per_program", "first", "feature_rows", "count"]
)
def split_image_tokens_kernel(
    source_ptr, source_batch_stride, source_stride,  # (batch, sequence, cols)
    mask_ptr,  # (rows,)
    text_ptr,  # (rows, cols) or None
    features_ptr,  # (feature_rows, cols) or None
    rows, sequence, cols, rows_per_program, first, feature_rows, count,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_MASK: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    if text_ptr is None:
        begin, end = unless_idle(mask_ptr, begin, end, rows, BLOCK_MASK)
    found = count_true(mask_ptr, 0, begin, BLOCK_MASK)
    for start in range(begin, end, BLOCK_ROWS):
        number, found = number_image_tokens(mask_ptr, start, end, found, BLOCK_ROWS)
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = row < end
        feature = number.to(tl.int64) - first
        is_mine = (number >= 0) & (feature >= 0) & (feature < feature_rows)
        is_text = inside & (number < 0)
        source = row // sequence * source_batch_stride + row % sequence * source_stride
        at = source_ptr + source[:, None]
        for left in range(0, cols, BLOCK_COLS):
            col = (left + tl.arange(0, BLOCK_COLS))[None, :]
            if text_ptr is not None:
                x = tl.load(at + col, mask=is_text[:, None] & (col < cols), other=0.0)
                tl.store(
                    text_ptr + row[:, None] * cols + col, x, mask=inside[:, None] & (col < cols)
                )
            if features_ptr is not None:
                copied = is_mine[:, None] & (col < cols)
                y = tl.load(at + col, mask=copied).to(features_ptr.dtype.element_ty)
                tl.store(features_ptr + feature[:, None] * cols + col, y, mask=copied)
    if count is not None:
        assert (end < rows) | (found == count), "image_mask has another count than rows to gather"
