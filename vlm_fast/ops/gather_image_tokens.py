"""The hidden states at the positions of image placeholders, gathered into one matrix."""

from __future__ import annotations

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


@op(
    hidden_states="floating (batch, sequence, hidden)",
    image_mask="bool (batch, sequence)",
    count="int from 0",
    where={
        "count <= batch * sequence": "count: 0 to {batch * sequence}, the positions of image_mask",
    },
)
def gather_image_tokens(hidden_states: Tensor, image_mask: Tensor, *, count: int) -> Tensor:
    """Gather the rows of ``hidden_states`` where ``image_mask`` is True.

    The inverse of `merge_image_tokens`. Mirrors ``hidden_states[image_mask]`` without its host
    synchronisation, because the caller, who placed the images, gives the number of rows.

    Args:
        image_mask: True at the positions to gather.
        count: How many entries of the mask are True.

    Returns:
        ``(count, hidden)``, freshly allocated, differentiable.

    Raises:
        ValueError: Also if ``count`` is wrong, as `merge_image_tokens` checks it.
    """
    return hidden_states[image_mask]


@gather_image_tokens.fallback_reason
def fallback_reason(hidden_states: Tensor, image_mask: Tensor, *, count: int) -> str | None:
    return why_not_merged(hidden_states)


@gather_image_tokens.forward
def forward(
    needs_grad: Any, hidden_states: Tensor, image_mask: Tensor, *, count: int
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    if counts_before_launch(image_mask):
        check_count("gather_image_tokens", "count", count, image_mask.sum())
    out = hidden_states.new_empty(count, hidden_states.shape[-1])
    found = kernels.split_image_tokens(hidden_states, image_mask, None, [(0, out)], count)
    check_count("gather_image_tokens", "count", count, found)
    return out, (image_mask if needs_grad.hidden_states else None,)


@gather_image_tokens.backward
def backward(needs_grad: Any, saved_tensors: Any, dy: Tensor, *, count: int) -> tuple[Tensor, None]:
    (mask,) = saved_tensors
    dhidden = dy.new_empty(*mask.shape, dy.shape[-1])
    kernels.merge_image_tokens(None, [dy], mask, dhidden)
    return dhidden, None


@gather_image_tokens.cost
def cost(hidden_states: Tensor, image_mask: Tensor, *, count: int) -> Cost:
    rows = count * hidden_states.shape[-1] * hidden_states.element_size()
    return Cost(0, 2 * rows + nbytes(image_mask), 0, rows + nbytes(hidden_states, image_mask))


@gather_image_tokens.inputs(
    smallest=dict(batch=1, sequence=1, hidden=1, images=1, tokens=1, count=1),
    usual=dict(batch=3, sequence=37, hidden=17, images=1, tokens=5, count=15),
    others=[
        dict(batch=1, sequence=7, hidden=24, images=0, tokens=0, count=0),
    ],
    large=dict(batch=5, sequence=107_000, hidden=4096, images=1, tokens=576, count=2880),
    bitwise=True,
    bench={
        "LLaVA-1.5-7B, 8 x 2944": dict(
            batch=8, sequence=2944, hidden=4096, images=1, tokens=576, count=4608
        ),
    },
)
def inputs(
    batch: int, sequence: int, hidden: int, images: int, tokens: int
) -> tuple[Tensor, Tensor]:
    mask = placeholders(batch, sequence, images, tokens)
    return torch.randn(batch, sequence, hidden), mask
