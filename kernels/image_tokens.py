"""Rows of image features moved into the image tokens of a text sequence and back.

Nothing of the hidden size is allocated, and of a mask no table is made: on a GPU each direction is
one launch for a tensor of features, and one for each tensor of a list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._image_token_kernels import BLOCK_ROWS, merge_image_tokens_kernel, split_image_tokens_kernel
from ._launcher import Grid, dense, is_traced, runs_triton
from ._native import native

# Programs of a launch, 4 for each multiprocessor of a large GPU. More programs would count more of
# the mask. Of a launch that moves image rows only, most programs have none and end at once.
MAX_PROGRAMS, MAX_PROGRAMS_WITHOUT_TEXT = 512, 2048


def merge_image_tokens(
    embeds: Tensor | None, features: Sequence[Tensor], mask: Tensor, out: Tensor
) -> int | None:
    """Write ``embeds``, with the rows of all features in order where the mask is true, to ``out``.

    embeds: ``(batch, sequence, cols)``, or None for zeros; features: ``(..., cols)`` each, of any
    floating dtype; mask: bool ``(batch, sequence)``; out: ``(batch, sequence, cols)``, contiguous.

    Returns None, or the number of true entries if the host found that there are not as many rows of
    features. On a GPU the kernel asserts that there are. If not, no address is wild.
    """
    batch, sequence, cols = out.shape
    images, mask = [row_matrix(image) for image in features], mask.contiguous()
    count = sum([image.shape[0] for image in images])
    if runs_triton(out):
        text = None if embeds is None else dense(embeds)
        first = 0
        for number, image in enumerate(images or [None]):
            feature_rows = 0 if image is None else image.shape[0]
            launch_merge(text, image, mask, out, first, feature_rows, count, write_text=number == 0)
            first, text = first + feature_rows, None
        return None
    if is_traced(out):
        return None
    if native is not None and out.is_cpu:
        text = None if embeds is None else equal_pitch(embeds)
        images = [image if image.dtype == out.dtype else image.to(out.dtype) for image in images]
        found = native.merge_image_tokens(
            *_address(text), mask.data_ptr(),
            [(image.data_ptr(), pitch(image), image.shape[0]) for image in images],
            out.data_ptr(), batch * sequence, cols * out.element_size(), torch.get_num_threads(),
        )  # fmt: skip
        return None if found == count else found
    at = mask.flatten().nonzero().flatten()
    found = at.shape[0]
    out.zero_() if embeds is None else out.copy_(embeds)
    first = 0
    for image in images:
        here = at[first : first + image.shape[0]]
        out.view(-1, cols).index_copy_(0, here, image[: here.shape[0]].to(out.dtype))
        first += image.shape[0]
    return None if found == count else found


def split_image_tokens(
    source: Tensor,
    mask: Tensor,
    text: Tensor | None,
    features: Sequence[tuple[int, Tensor]],
    count: int | None = None,
) -> int | None:
    """Write the rows of ``source (batch, sequence, cols)`` at image tokens to ``features``.

    features: pairs of the number of the first image token, counted from the start of the batch,
    and a contiguous ``(..., cols)`` that takes its row and the following ones; text: takes the
    source with zeros at image tokens, contiguous; count: the number of image tokens, None if it
    need not be checked.

    Returns None, or the number of image tokens if it is another, as `merge_image_tokens` does.
    """
    batch, sequence, cols = source.shape
    rows, mask = batch * sequence, mask.contiguous()
    if runs_triton(source):
        source = dense(source)
        launches: list[tuple[int, Tensor | None]] = [*features] or [(0, None)]
        for first, image in launches:
            share, grid = _shares(rows, with_text=text is not None)
            feature_rows = 0 if image is None else math.prod(image.shape[:-1])
            split_image_tokens_kernel(
                grid, source, source.stride(0), source.stride(1), mask, text, image,
                rows, sequence, cols, share, first, feature_rows, count,
            )  # fmt: skip
            text = None
        return None
    if is_traced(source):
        return None
    if native is not None and source.is_cpu:
        source = equal_pitch(source)
        parts = [(first, _like(image, source.dtype)) for first, image in features]
        found = native.split_image_tokens(
            *_address(source), mask.data_ptr(), 0 if text is None else text.data_ptr(),
            [(image.data_ptr(), first, math.prod(image.shape[:-1])) for first, image in parts],
            rows, cols * source.element_size(), torch.get_num_threads(),
        )  # fmt: skip
        for (_, image), (_, part) in zip(features, parts, strict=True):
            if image is not part:
                image.copy_(part)
    else:
        at = mask.flatten().nonzero().flatten()
        found = at.shape[0]
        for first, image in features:
            here = at[first : first + math.prod(image.shape[:-1])]
            image.view(-1, cols)[: here.shape[0]] = row_matrix(source).index_select(0, here)
        if text is not None:
            text.copy_(source).view(rows, cols).index_fill_(0, at, 0)
    return None if count is None or found == count else found


def launch_merge(
    text: Tensor | None, image: Tensor | None, mask: Tensor, out: Tensor,
    first: int, feature_rows: int, count: int, *, write_text: bool = True,
    index: Tensor | None = None, fill: Tensor | None = None, positions: Tensor | None = None,
) -> None:  # fmt: skip
    """Launch the merge of a matrix of features, of rows of it by an index, or of none.

    It takes image tokens ``[first, first + feature_rows)`` of ``count``, and the text.
    """
    batch, sequence, cols = out.shape
    share, grid = _shares(batch * sequence, write_text)
    limit, stride = (0, 0) if image is None else (image.shape[0], image.stride(0))
    merge_image_tokens_kernel(
        grid, text, 0 if text is None else text.stride(0), 0 if text is None else text.stride(1),
        image, stride, index, fill, mask, out, positions,
        batch * sequence, sequence, cols, share, first, feature_rows, count, limit, write_text,
    )  # fmt: skip


def row_matrix(x: Tensor) -> Tensor:
    """x as ``(rows, cols)`` with dense rows, a view if the strides allow it."""
    x = dense(x)
    return x if x.ndim == 2 else x.flatten(0, -2)


def _shares(rows: int, with_text: bool) -> tuple[int, Grid]:
    """The number of rows of each program, and the grid."""
    most = MAX_PROGRAMS if with_text else MAX_PROGRAMS_WITHOUT_TEXT
    share = BLOCK_ROWS * -(-rows // (BLOCK_ROWS * most))
    return share, lambda blocks: (-(-rows // share),)


def equal_pitch(x: Tensor) -> Tensor:
    """x ``(batch, sequence, cols)`` with dense rows, each at the same distance from the one before.

    Copied only if necessary, and made a matrix only then or if its strides do not tell.
    """
    batch_stride, row_stride, col_stride = x.stride()
    is_equal = col_stride == 1 and batch_stride == x.shape[1] * row_stride
    return x if is_equal else dense(x).flatten(0, 1)


def _like(image: Tensor, dtype: torch.dtype) -> Tensor:
    """The image, or an uninitialised one of its shape if it has another dtype."""
    return image if image.dtype == dtype else image.new_empty(*image.shape, dtype=dtype)


def _address(text: Tensor | None) -> tuple[int, int]:
    return (0, 0) if text is None else (text.data_ptr(), pitch(text))


def pitch(rows: Tensor) -> int:
    """Bytes between rows."""
    return rows.stride(-2) * rows.element_size()
