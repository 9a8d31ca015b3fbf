"""Copies rows of image tiles into the order of a prompt, by index; one program per packed row.

An index has the source's row for every row of the result. An entry that is no row of the source,
such as -1, selects the fill row (the newline) or zeros, so no entry is used as a wild address. The
backward is the same kernel with the inverse index. Only the fill row's gradient is a sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launcher import Config, dense, is_traced, kernel, runs_triton
from ._native import native
from ._sum_shares import new_shares, split_rows, store_share, sum_shares
from ._triton import tl, triton
from .image_tokens import equal_pitch, launch_merge, pitch, row_matrix

UNIT = tl.constexpr(2.0**-30)  # the unit of integer weights


@kernel(Config({"BLOCK_COLS": 2048}, num_warps=4))
@triton.jit(do_not_specialize=["limit"])
def pack_rows_kernel(
    source_ptr, source_stride,  # (limit or more, cols)
    index_ptr,  # (rows,) int32
    source_slots_ptr,  # (limit,) int32 or None: the source's row for each index
    fill_ptr,  # (cols,) or None
    out_ptr,  # (rows or more, cols)
    limit, cols, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    index = tl.load(index_ptr + program).to(tl.int64)
    is_row = (index >= 0) & (index < limit)
    row = index
    if source_slots_ptr is not None:
        row = tl.load(source_slots_ptr + index, mask=is_row, other=0).to(tl.int64)
    for start in range(0, cols, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS)
        inside = col < cols
        x = tl.load(source_ptr + row * source_stride + col, mask=inside & is_row, other=0.0)
        if fill_ptr is not None:
            fill = tl.load(fill_ptr + col, mask=inside & (is_row == 0), other=0.0)
            x = tl.where(is_row, x, fill.to(x.dtype))
        tl.store(out_ptr + program * cols + col, x.to(out_ptr.dtype.element_ty), mask=inside)


@kernel(Config({"BLOCK_COLS": 512}, num_warps=2))
@triton.jit(do_not_specialize=["limit"])
def blend_rows_kernel(
    source_ptr, source_stride,  # (limit, cols)
    taps_ptr, weights_ptr,  # (rows, 4) int32
    fill_ptr,  # (cols,) or None: for rows whose first tap is no row
    out_ptr,  # (rows, cols)
    limit, cols, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(taps_ptr + row * 4)
    for start in range(0, cols, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS)
        inside = col < cols
        total = tl.zeros([BLOCK_COLS], dtype=tl.float32)
        for tap in tl.static_range(4):
            at = tl.load(taps_ptr + row * 4 + tap).to(tl.int64)
            weight = tl.load(weights_ptr + row * 4 + tap).to(tl.float32) * UNIT
            is_row = (at >= 0) & (at < limit)
            x = tl.load(source_ptr + at * source_stride + col, mask=inside & is_row, other=0.0)
            total += tl.where(is_row, x.to(tl.float32) * weight, 0.0)
        x = total.to(out_ptr.dtype.element_ty)
        if fill_ptr is not None:
            is_fill = (first < 0) | (first >= limit)
            fill = tl.load(fill_ptr + col, mask=inside & is_fill, other=0.0)
            x = tl.where(is_fill, fill.to(x.dtype), x)
        tl.store(out_ptr + row * cols + col, x, mask=inside)


@kernel(Config({"BLOCK_ROWS": 8, "BLOCK_COLS": 512}, num_warps=4))
@triton.jit(do_not_specialize=["limit", "rows", "rows_per_share"])
def fill_gradient_kernel(
    dy_ptr, dy_stride,  # (rows or more, cols)
    index_ptr, index_stride,  # (rows,) int32
    slots_ptr,  # (rows,) int32 or None: dy's row for each index
    dfill_ptr, shares_ptr, shares_row,  # (cols,); (shares, cols) fp32, or None for one
    limit, rows, rows_per_share, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    # Few rows are fill rows; the masked loads of the others cause no traffic.
    col_blocks = tl.cdiv(cols, BLOCK_COLS)
    share = tl.program_id(0).to(tl.int64) // col_blocks
    col = (tl.program_id(0) % col_blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside_cols = col < cols
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.float32)
    first = share * rows_per_share
    last = tl.minimum(first + rows_per_share, rows)
    for start in range(0, rows_per_share, BLOCK_ROWS):
        at = first + start + tl.arange(0, BLOCK_ROWS)
        inside = at < last
        index = tl.load(index_ptr + at * index_stride, mask=inside, other=0)
        is_fill = inside & ((index < 0) | (index >= limit))
        row = at
        if slots_ptr is not None:
            row = tl.load(slots_ptr + at, mask=is_fill, other=0).to(tl.int64)
        dy = tl.load(
            dy_ptr + row[:, None] * dy_stride + col[None, :],
            mask=is_fill[:, None] & inside_cols[None, :], other=0.0,
        )  # fmt: skip
        total += dy.to(tl.float32)
    store_share(dfill_ptr, shares_ptr, share * shares_row, tl.sum(total, axis=0), col, inside_cols)


def pack_rows(
    source: Tensor, index: Tensor, fill: Tensor | None, *, slots: Tensor | None = None,
    limit: int | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Return ``source[index]`` ``(rows, cols)``, with ``fill`` or zeros where index is no row.

    source: ``(..., cols)``; index: ``(rows,)`` int32; fill: ``(cols,)``. With slots ``(limit,)``
    int32 the rows are ``source[slots[index]]``.
    """
    matrix, index, fill = row_matrix(source), index.contiguous(), _dense(fill)
    limit = matrix.shape[0] if limit is None else limit
    rows, cols = index.shape[0], matrix.shape[1]
    out = matrix.new_empty(rows, cols, dtype=dtype)
    if runs_triton(source):
        pack_rows_kernel(
            lambda blocks: (rows,),
            matrix, matrix.stride(0), index, slots, fill, out, limit, cols,
        )  # fmt: skip
    elif is_traced(source):
        pass
    elif native is not None and source.is_cpu and out.dtype == matrix.dtype:
        fill = None if fill is None else fill.to(out.dtype)
        native.pack_rows(
            matrix.data_ptr(), pitch(matrix), _address(slots), index.data_ptr(), limit,
            _address(fill), out.data_ptr(), rows, cols * out.element_size(),
            torch.get_num_threads(),
        )  # fmt: skip
    else:
        is_row = (index >= 0) & (index < limit)
        row = torch.where(is_row, index, 0)
        row = row if slots is None or limit == 0 else slots[row]
        found = matrix.index_select(0, row) if limit else matrix.new_zeros(rows, cols)
        other = matrix.new_zeros(()) if fill is None else fill.to(matrix.dtype)
        out.copy_(torch.where(is_row[:, None], found, other))
    return out


def merge_packed_rows(
    embeds: Tensor, mask: Tensor, source: Tensor, index: Tensor, fill: Tensor | None, out: Tensor,
    positions: Tensor | None,
) -> int | None:  # fmt: skip
    """Write ``embeds``, with `pack_rows` of the source where the mask is true, to ``out``.

    embeds, out: ``(batch, sequence, cols)``; mask: bool ``(batch, sequence)``; positions:
    ``(packed,)`` int32, takes the row of each packed row. Returns what `merge_image_tokens` does.
    """
    count, cols, mask = index.shape[0], out.shape[2], mask.contiguous()
    matrix, index, fill = row_matrix(source), index.contiguous(), _dense(fill)
    if runs_triton(out):
        launch_merge(
            dense(embeds), matrix, mask, out, 0, count, count,
            index=index, fill=fill, positions=positions,
        )  # fmt: skip
        return None
    if is_traced(out):
        return None
    if native is not None and out.is_cpu:
        # Rounded to the features' dtype first, as if it were one of their rows.
        fill = None if fill is None else fill.to(matrix.dtype).to(out.dtype)
        matrix, text = matrix.to(out.dtype), equal_pitch(embeds)
        found = native.merge_packed_rows(
            text.data_ptr(), pitch(text), mask.data_ptr(), matrix.data_ptr(), pitch(matrix),
            index.data_ptr(), count, matrix.shape[0], _address(fill), out.data_ptr(),
            _address(positions), mask.numel(), cols * out.element_size(), torch.get_num_threads(),
        )  # fmt: skip
        return None if found == count else found
    at = mask.flatten().nonzero().flatten()
    if at.shape[0] == count:
        packed = pack_rows(source, index, fill).to(out.dtype)
        out.copy_(embeds).view(-1, cols).index_copy_(0, at, packed)
        if positions is not None:
            positions.copy_(at)
        return None
    return at.shape[0]


def blend_rows(source: Tensor, taps: Tensor, weights: Tensor, fill: Tensor | None) -> Tensor:
    """Return weighted sums ``(rows, cols)`` of up to four rows of the source each.

    source: ``(..., cols)``; taps: ``(rows, 4)`` int32 row numbers, where a number that is no row
    adds nothing; weights: ``(rows, 4)`` int32 in units of 2**-30. If the first tap is no row, the
    result is ``fill`` or zeros.
    """
    matrix, fill = row_matrix(source), _dense(fill)
    taps, weights = taps.contiguous(), weights.contiguous()
    (limit, cols), rows = matrix.shape, taps.shape[0]
    out = matrix.new_empty(rows, cols)
    if runs_triton(source):
        blend_rows_kernel(
            lambda blocks: (rows,),
            matrix, matrix.stride(0), taps, weights, fill, out, limit, cols,
        )  # fmt: skip
    elif is_traced(source):
        pass
    elif native is not None and source.is_cpu and out.dtype in (torch.bfloat16, torch.float32):
        fill = None if fill is None else fill.to(out.dtype)
        native.blend_rows(
            matrix.data_ptr(), pitch(matrix), taps.data_ptr(), weights.data_ptr(), limit,
            _address(fill), out.data_ptr(), rows, cols, out.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )  # fmt: skip
    else:
        total = matrix.new_zeros(rows, cols, dtype=torch.float32)
        for tap, weight in zip(taps.unbind(1), weights.unbind(1), strict=True):
            at = ((tap >= 0) & (tap < limit)).nonzero().flatten()
            part = matrix.index_select(0, tap[at]) * (weight[at].float() * 2.0**-30)[:, None]
            total.index_add_(0, at, part)
        out.copy_(total)
        if fill is not None:
            first = taps[:, 0]
            out[(first < 0) | (first >= limit)] = fill.to(out.dtype)
    return out


def fill_gradient(
    dy: Tensor, index: Tensor, limit: int, dtype: torch.dtype, *, slots: Tensor | None = None
) -> Tensor:
    """The gradient ``(cols,)`` of fill: the fp32 sum of dy's rows whose index is no row."""
    matrix = row_matrix(dy)
    rows, cols = index.shape[0], matrix.shape[1]
    if runs_triton(dy) or is_traced(dy):
        dfill = dy.new_empty(cols, dtype=dtype)
        if runs_triton(dy):
            rows_per_share, count = split_rows(rows, least=16)
            shares, row = new_shares(count, dfill)
            fill_gradient_kernel(
                lambda blocks: (count * -(-cols // blocks["BLOCK_COLS"]),),
                matrix, matrix.stride(0), index, index.stride(0), slots, dfill, shares, row,
                limit, rows, rows_per_share, cols,
            )  # fmt: skip
            sum_shares(shares, dfill)
        return dfill
    at = ((index < 0) | (index >= limit)).nonzero().flatten()
    at = at if slots is None else slots[at]
    return matrix.index_select(0, at).sum(0, dtype=torch.float32).to(dtype)


def _dense(fill: Tensor | None) -> Tensor | None:
    return None if fill is None else fill.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
