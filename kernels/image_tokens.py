"""Copies rows of image features into a text sequence and back; one program per row.

``slots`` lists, in ascending order, the flat row numbers (batch * sequence) where the mask is true:
4 bytes per feature row. Nothing of the hidden size is allocated except results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._launcher import Config, is_traced, kernel, runs_triton
from ._native import native
from ._triton import tl, triton

SLOT_BLOCK = 4096


@kernel(Config({"BLOCK": SLOT_BLOCK}, num_warps=8))
@triton.jit(do_not_specialize=["batch", "sequence", "capacity"])
def image_token_slots_kernel(
    mask_ptr,  # (batch, sequence) bytes, contiguous
    slots_ptr,  # (capacity,) int32
    count_ptr,  # () int32
    batch, sequence, capacity, BLOCK: tl.constexpr,
):  # fmt: skip
    # A program per sequence counts the mask of all earlier sequences, a few kilobytes in L2. That
    # costs less than a second launch or a look-back between programs.
    sample = tl.program_id(0)
    first = sample.to(tl.int64) * sequence
    lane = tl.arange(0, BLOCK)
    partial = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, first, BLOCK):
        row = start + lane
        partial += (tl.load(mask_ptr + row, mask=row < first, other=0) != 0).to(tl.int32)
    found = tl.sum(partial)
    for start in range(0, sequence, BLOCK):
        token = start + lane
        inside = token < sequence
        here = (tl.load(mask_ptr + first + token, mask=inside, other=0) != 0).to(tl.int32)
        slot = found + tl.cumsum(here, axis=0) - 1
        row = (first + token).to(tl.int32)
        tl.store(slots_ptr + slot, row, mask=inside & (here != 0) & (slot < capacity))
        found += tl.sum(here)
    if sample == batch - 1:
        tl.store(count_ptr, found)
        for start in range(found, capacity, BLOCK):
            slot = start + lane
            tl.store(slots_ptr + slot, tl.zeros([BLOCK], dtype=tl.int32), mask=slot < capacity)


@kernel(Config({"BLOCK_COLS": 2048}, num_warps=4))
@triton.jit(do_not_specialize=["feature_rows", "first_slot"])
def merge_image_tokens_kernel(
    features_ptr, features_stride,  # (feature_rows, cols) or None
    slots_ptr, first_slot,
    text_ptr, text_stride,  # (rows, cols) or None
    mask_ptr,  # (rows,) bytes
    out_ptr,  # (rows, cols)
    feature_rows, cols, CLEAR_IMAGE_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    # The first `feature_rows` programs copy a feature row each and the others a text row, so that
    # one launch is enough and no row of the result is written twice.
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_COLS)
    if program < feature_rows:
        if features_ptr is not None:
            row = tl.load(slots_ptr + first_slot + program).to(tl.int64)
            for start in range(0, cols, BLOCK_COLS):
                col = start + lane
                inside = col < cols
                x = tl.load(features_ptr + program * features_stride + col, mask=inside)
                x = x.to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + row * cols + col, x, mask=inside)
    else:
        if text_ptr is not None:
            row = program - feature_rows
            is_text = tl.load(mask_ptr + row) == 0
            if is_text | CLEAR_IMAGE_ROWS:
                for start in range(0, cols, BLOCK_COLS):
                    col = start + lane
                    inside = col < cols
                    x = tl.load(
                        text_ptr + row * text_stride + col, mask=inside & is_text, other=0.0
                    )
                    tl.store(out_ptr + row * cols + col, x, mask=inside)


@kernel(Config({"BLOCK_COLS": 2048}, num_warps=4))
@triton.jit(do_not_specialize=["first_slot"])
def gather_image_tokens_kernel(
    source_ptr, source_stride,  # (rows, cols)
    slots_ptr, first_slot,
    out_ptr,  # (feature_rows, cols)
    cols, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0).to(tl.int64)
    row = tl.load(slots_ptr + first_slot + feature).to(tl.int64)
    for start in range(0, cols, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS)
        inside = col < cols
        x = tl.load(source_ptr + row * source_stride + col, mask=inside)
        x = x.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + feature * cols + col, x, mask=inside)


def image_token_slots(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor | int]:
    """Return ``slots (capacity,)`` int32 and the count of true entries of ``mask``.

    mask: bool ``(batch, sequence)``, with at least one entry. The count is a 0-d tensor on a GPU,
    so that the host need not wait for it, and an int on a CPU. Slots past the count are 0, so that
    a wrong count of a caller never leads to a wild address.
    """
    mask = mask.contiguous()
    slots = mask.new_empty(capacity, dtype=torch.int32)
    if runs_triton(mask) or is_traced(mask):
        count = mask.new_empty((), dtype=torch.int32)
        if not runs_triton(mask):
            return slots, count
        batch, sequence = mask.shape
        image_token_slots_kernel(
            lambda blocks: (batch,),
            mask.view(torch.uint8), slots, count, batch, sequence, capacity,
        )  # fmt: skip
        return slots, count
    if native is not None and mask.is_cpu:
        found = native.image_token_slots(mask.data_ptr(), mask.numel(), slots.data_ptr(), capacity)
    else:
        rows = mask.flatten().nonzero().flatten()
        found = rows.numel()
        slots[:found] = rows[:capacity]
    if found < capacity:
        slots[found:] = 0
    return slots, found


def merge_image_tokens(
    embeds: Tensor, features: Sequence[Tensor], mask: Tensor, slots: Tensor
) -> Tensor:
    """Return ``embeds (batch, sequence, cols)`` with the rows of all ``features`` in its slots."""
    out = embeds.new_empty(embeds.shape)
    text, images = row_matrix(embeds), [row_matrix(image) for image in features]
    rows, cols = text.shape
    if runs_triton(embeds):
        _merge(images[0] if images else None, slots, 0, text, mask, out, cols)
        first = images[0].shape[0] if images else 0
        for image in images[1:]:
            _merge(image, slots, first, None, mask, out, cols)
            first += image.shape[0]
    elif is_traced(embeds):
        pass
    elif native is not None and embeds.is_cpu:
        images = [image.to(embeds.dtype) for image in images]
        native.merge_image_tokens(
            text.data_ptr(), _pitch(text), slots.data_ptr(),
            [image.data_ptr() for image in images], [image.shape[0] for image in images],
            [_pitch(image) for image in images],
            out.data_ptr(), rows, cols * out.element_size(), torch.get_num_threads(),
        )  # fmt: skip
    else:
        out.copy_(embeds)
        first = 0
        for image in images:
            where = slots[first : first + image.shape[0]].long()
            out.view(-1, cols).index_copy_(0, where, image.to(out.dtype))
            first += image.shape[0]
    return out


def clear_image_tokens(source: Tensor, mask: Tensor, slots: Tensor) -> Tensor:
    """The gradient of the text: ``source (batch, sequence, cols)`` with zeros in its slots."""
    out = source.new_empty(source.shape)
    text = row_matrix(source)
    rows, cols = text.shape
    if runs_triton(source):
        _merge(None, slots, 0, text, mask, out, cols, clear=True)
    elif is_traced(source):
        pass
    elif native is not None and source.is_cpu:
        native.clear_image_tokens(
            text.data_ptr(), _pitch(text), slots.data_ptr(), slots.numel(),
            out.data_ptr(), rows, cols * out.element_size(), torch.get_num_threads(),
        )  # fmt: skip
    else:
        out.copy_(source).view(-1, cols).index_fill_(0, slots.long(), 0)
    return out


def gather_image_tokens(source: Tensor, slots: Tensor, first: int, out: Tensor) -> None:
    """Write ``source[slots[first + j]]`` to ``out[j]``, for rows of ``(batch, sequence, cols)``."""
    matrix = row_matrix(source)
    rows = math.prod(out.shape[:-1])  # Size.numel() would specialize a dynamic shape
    cols = matrix.shape[1]
    if runs_triton(source):
        gather_image_tokens_kernel(
            lambda blocks: (rows,), matrix, matrix.stride(0), slots, first, out, cols
        )
    elif is_traced(source):
        pass
    elif native is not None and source.is_cpu and source.dtype == out.dtype:
        native.gather_image_tokens(
            matrix.data_ptr(), _pitch(matrix), slots.data_ptr(), first,
            rows, out.data_ptr(), cols * out.element_size(), torch.get_num_threads(),
        )  # fmt: skip
    else:
        out.view(-1, cols).copy_(matrix.index_select(0, slots[first : first + rows].long()))


def place_image_tokens(features: Tensor, mask: Tensor, slots: Tensor) -> Tensor:
    """The gradient of the gather: ``features (slots, cols)`` in their slots, zeros elsewhere."""
    image = row_matrix(features)
    cols = image.shape[1]
    if runs_triton(features) or is_traced(features):
        out = features.new_empty(*mask.shape, cols)
        if runs_triton(features):
            # The text is one row of zeros with stride 0; zeroing the result would write it twice.
            text = features.new_zeros(1, cols).expand(mask.numel(), cols)
            _merge(image, slots, 0, text, mask, out, cols)
        return out
    out = features.new_zeros(*mask.shape, cols)
    out.view(-1, cols).index_copy_(0, slots.long(), image)
    return out


def copy_text(text: Tensor, mask: Tensor, out: Tensor) -> None:
    """Copy rows of ``text (rows, cols)`` to ``out`` where ``mask`` is false.

    The other rows of out are undefined afterwards.
    """
    if runs_triton(text):
        _merge(None, None, 0, text, mask, out, text.shape[1])
    elif not is_traced(text):
        out.view(text.shape).copy_(text)


def row_matrix(x: Tensor) -> Tensor:
    """x as ``(rows, cols)`` with dense rows, a view if the strides allow it."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.flatten(0, -2)


def _merge(
    image: Tensor | None,
    slots: Tensor | None,
    first: int,
    text: Tensor | None,
    mask: Tensor,
    out: Tensor,
    cols: int,
    clear: bool = False,
) -> None:
    """Launch the copy of one image's rows and of the text's rows, or of one of them."""
    feature_rows = 0 if image is None else image.shape[0]
    programs = feature_rows + (0 if text is None else text.shape[0])
    merge_image_tokens_kernel(
        lambda blocks: (programs,),
        image, 0 if image is None else image.stride(0), slots, first,
        text, 0 if text is None else text.stride(0), mask.contiguous().view(torch.uint8),
        out, feature_rows, cols, clear,
    )  # fmt: skip


def _pitch(matrix: Tensor) -> int:
    return matrix.stride(0) * matrix.element_size()
