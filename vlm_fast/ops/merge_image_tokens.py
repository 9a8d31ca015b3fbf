"""Image features scattered into the placeholder positions of a text sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_fast.kernels import image_tokens as kernels
from vlm_fast.ops.declaration import Cost, nbytes, op
from vlm_fast.ops.image_token_rows import (
    check_count,
    counts_before_launch,
    placeholders,
    why_not_merged,
)
from vlm_fast.ops.rows import empty_like_rows, row_count

NAME = "merge_image_tokens"


@op(
    inputs_embeds="floating (batch, sequence, hidden)",
    image_features="list of floating (..., hidden)",
    image_mask="bool (batch, sequence)",
)
def merge_image_tokens(
    inputs_embeds: Tensor, image_features: Tensor | Sequence[Tensor], image_mask: Tensor
) -> Tensor:
    """Scatter image features into the placeholder positions of ``inputs_embeds``.

    Mirrors ``inputs_embeds.masked_scatter(mask.unsqueeze(-1), features.to(inputs_embeds.dtype))``
    of transformers' LLaVA-type models, but checks the count, and the only tensor of the hidden
    size that it allocates is the result. Out of place and deterministic, with gradients to both.

    Args:
        image_features: One tensor, or a list with one per image. Cast to the dtype of
            ``inputs_embeds``.
        image_mask: True at the positions that take the rows of the features, in order.

    Returns:
        ``(batch, sequence, hidden)`` in the dtype of ``inputs_embeds``, freshly allocated.

    Raises:
        ValueError: Also if the mask has not as many True entries as there are feature rows. On CUDA
            the kernel asserts that without a synchronisation: it prints "image_mask has another
            count than ..." with file and line to stderr, and the next call that synchronises raises
            "CUDA error: device-side assert triggered". Under `vlm_fast.strict` the host counts
            first and raises the ValueError.
    """
    hidden = inputs_embeds.shape[-1]
    images = [image_features] if isinstance(image_features, Tensor) else image_features
    rows = [image.reshape(row_count(image), hidden).to(inputs_embeds.dtype) for image in images]
    features = torch.cat(rows) if rows else inputs_embeds.new_empty(0, hidden)
    return inputs_embeds.masked_scatter(image_mask.unsqueeze(-1), features)


@merge_image_tokens.check
def check(
    inputs_embeds: Tensor, image_features: list[Tensor], image_mask: Tensor
) -> ValueError | None:
    rows = _rows(image_features)
    if rows > image_mask.numel():
        return ValueError(
            f"vlm_fast.merge_image_tokens: image_features has {rows} rows, expected at most "
            f"{image_mask.numel()}, the positions of image_mask"
        )
    return None


def _rows(images: Sequence[Tensor]) -> int:
    return sum([row_count(image) for image in images])


@merge_image_tokens.fallback_reason
def fallback_reason(
    inputs_embeds: Tensor, image_features: list[Tensor], image_mask: Tensor
) -> str | None:
    return why_not_merged(inputs_embeds)


@merge_image_tokens.forward
def forward(
    needs_grad: Any, inputs_embeds: Tensor, image_features: list[Tensor], image_mask: Tensor
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    if counts_before_launch(image_mask):
        check_count(NAME, "image_features", _rows(image_features), image_mask.sum())
    out = inputs_embeds.new_empty(*inputs_embeds.shape)
    found = kernels.merge_image_tokens(inputs_embeds, image_features, image_mask, out)
    if found is not None:
        check_count(NAME, "image_features", _rows(image_features), found)
    if not needs_grad.image_features:
        return out, (image_mask if needs_grad.inputs_embeds else None,)
    return out, (image_mask, *[empty_like_rows(image) for image in image_features])


@merge_image_tokens.backward
def backward(
    needs_grad: Any, saved_tensors: Any, dy: Tensor
) -> tuple[Tensor | None, list[Tensor | None] | None, None]:
    mask, *images = saved_tensors
    dembeds = dy.new_empty(*dy.shape) if needs_grad.inputs_embeds else None
    dfeatures: list[Tensor | None] = []
    wanted, first = [], 0
    for image, needed in zip(images, needs_grad.image_features, strict=True):
        dimage = image.new_empty(*image.shape[:-1], dy.shape[-1]) if needed else None
        if dimage is not None:
            wanted.append((first, dimage))
        dfeatures.append(dimage)
        first += row_count(image)
    kernels.split_image_tokens(dy, mask, dembeds, wanted)
    return dembeds, dfeatures or None, None


@merge_image_tokens.cost
def cost(
    inputs_embeds: Tensor, image_features: Tensor | Sequence[Tensor], image_mask: Tensor
) -> Cost:
    images = [image_features] if isinstance(image_features, Tensor) else image_features
    rows = _rows(images)
    hidden = inputs_embeds.shape[-1]
    text = nbytes(inputs_embeds) - rows * hidden * inputs_embeds.element_size()
    moved = nbytes(*images) + text + nbytes(inputs_embeds)
    return Cost(0, moved + nbytes(image_mask), 0, moved + nbytes(image_mask))


@merge_image_tokens.inputs(
    smallest=dict(batch=1, sequence=1, hidden=1, images=1, tokens=1),
    usual=dict(batch=3, sequence=37, hidden=17, images=1, tokens=5),
    others=[
        dict(batch=2, sequence=50, hidden=100, images=2, tokens=9),
        dict(batch=2, sequence=8, hidden=64, images=2, tokens=4),
        dict(batch=1, sequence=7, hidden=24, images=0, tokens=0),
        dict(batch=2, sequence=30, hidden=40, images=3, tokens=4, as_list=True),
    ],
    large=dict(batch=5, sequence=107_000, hidden=4096, images=1, tokens=576),
    bitwise=True,
    bench={
        "LLaVA-1.5-7B, 8 x 2944": dict(batch=8, sequence=2944, hidden=4096, images=1, tokens=576),
        "LLaVA-1.5-7B, 16 x 1024": dict(batch=16, sequence=1024, hidden=4096, images=1, tokens=576),
        "1 image, 1 x 2048": dict(batch=1, sequence=2048, hidden=4096, images=1, tokens=576),
        "LLaVA-NeXT, 8 x 4096": dict(batch=8, sequence=4096, hidden=4096, images=1, tokens=2880),
    },
)
def inputs(
    batch: int, sequence: int, hidden: int, images: int, tokens: int, *, as_list: bool = False
) -> tuple[Tensor, Tensor | list[Tensor], Tensor]:
    mask = placeholders(batch, sequence, images, tokens)
    features = torch.randn(batch * images, tokens, hidden)
    return torch.randn(batch, sequence, hidden), list(features) if as_list else features, mask
