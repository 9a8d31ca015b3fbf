"""Image features into the placeholder slots of a text sequence, and out of them again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_fast.fallback import policy
from vlm_fast.kernels import image_tokens as kernels
from vlm_fast.ops.declaration import Cost, nbytes, op

MAX_ROWS = 2**31 - 1  # slots are int32


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
    of transformers' LLaVA-type models, but checks the count and forms nothing of the hidden size
    beside the result. Out of place, deterministic, with gradients to both.

    Args:
        image_features: One tensor, or a list with one per image. Cast to the dtype of
            ``inputs_embeds``.
        image_mask: True at the positions that take the rows of the features, in order.

    Returns:
        ``(batch, sequence, hidden)`` in the dtype of ``inputs_embeds``, freshly allocated.

    Raises:
        ValueError: Also if the mask has not as many True entries as there are feature rows. On CUDA
            that count is checked on the device without a synchronisation (a device-side assertion),
            and on the host only under `vlm_fast.strict`.
    """
    hidden = inputs_embeds.shape[-1]
    images = [image_features] if isinstance(image_features, Tensor) else image_features
    rows = [image.reshape(row_count(image), hidden).to(inputs_embeds.dtype) for image in images]
    every = torch.cat(rows) if rows else inputs_embeds.new_empty(0, hidden)
    return inputs_embeds.masked_scatter(image_mask.unsqueeze(-1), every)


@merge_image_tokens.check
def check(inputs_embeds, image_features, image_mask):
    rows = 0
    for image in image_features:
        rows += row_count(image)
    if rows > image_mask.numel():
        return ValueError(
            f"vlm_fast.merge_image_tokens: image_features has {rows} rows, expected at most "
            f"{image_mask.numel()}, the positions of image_mask"
        )
    return None


@merge_image_tokens.fallback_reason
def fallback_reason(inputs_embeds, image_features, image_mask):
    return no_rows(inputs_embeds)


@merge_image_tokens.forward
def forward(needs_grad, inputs_embeds, image_features, image_mask):
    count = sum(row_count(image) for image in image_features)
    slots, found = kernels.image_token_slots(image_mask, count)
    check_count("merge_image_tokens", "image_features", count, found)
    out = kernels.merge_image_tokens(inputs_embeds, image_features, image_mask, slots)
    wanted = needs_grad.inputs_embeds or needs_grad.image_features
    return out, (
        image_mask if needs_grad.inputs_embeds else None,
        slots if wanted else None,
        *(likeness(image) if needs_grad.image_features else None for image in image_features),
    )


@merge_image_tokens.backward
def backward(needs_grad, saved_tensors, dy):
    mask, slots, *likenesses = saved_tensors
    dembeds = kernels.clear_image_tokens(dy, mask, slots) if needs_grad.inputs_embeds else None
    first = 0
    dfeatures: list[Tensor | None] = []
    for likeness in likenesses:
        if likeness is None:
            dfeatures.append(None)
            continue
        dimage = likeness.new_empty(*likeness.shape[:-1], dy.shape[-1])
        kernels.gather_image_tokens(dy, slots, first, dimage)
        dfeatures.append(dimage)
        first += row_count(dimage)
    return dembeds, dfeatures, None


@merge_image_tokens.cost
def cost(inputs_embeds, image_features, image_mask):
    images = [image_features] if isinstance(image_features, Tensor) else image_features
    rows = sum(row_count(image) for image in images)
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
def inputs(batch, sequence, hidden, images, tokens, *, as_list=False):
    mask = placeholders(batch, sequence, images, tokens)
    features = torch.randn(batch * images, tokens, hidden)
    return torch.randn(batch, sequence, hidden), list(features) if as_list else features, mask


@op(
    hidden_states="floating (batch, sequence, hidden)",
    image_mask="bool (batch, sequence)",
    count="int from 0",
    where={
        "count <= batch * sequence": "count: 0 to {batch * sequence}, the positions of image_mask",
    },
)
def gather_image_tokens(hidden_states: Tensor, image_mask: Tensor, *, count: int) -> Tensor:
    """Gather the rows of ``hidden_states`` where the mask is True: the inverse of the merge.

    Mirrors ``hidden_states[image_mask]`` without its host synchronisation: the caller, who placed
    the images, says how many rows there are.

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
def gather_fallback_reason(hidden_states, image_mask, *, count):
    return no_rows(hidden_states)


@gather_image_tokens.forward
def gather_forward(needs_grad, hidden_states, image_mask, *, count):
    slots, found = kernels.image_token_slots(image_mask, count)
    check_count("gather_image_tokens", "count", count, found)
    out = hidden_states.new_empty(count, hidden_states.shape[-1])
    kernels.gather_image_tokens(hidden_states, slots, 0, out)
    return out, (image_mask, slots) if needs_grad.hidden_states else (None, None)


@gather_image_tokens.backward
def gather_backward(needs_grad, saved_tensors, dy, *, count):
    mask, slots = saved_tensors
    return kernels.place_image_tokens(dy, mask, slots), None


@gather_image_tokens.cost
def gather_cost(hidden_states, image_mask, *, count):
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
def gather_inputs(batch, sequence, hidden, images, tokens):
    mask = placeholders(batch, sequence, images, tokens)
    return torch.randn(batch, sequence, hidden), mask


def placeholders(batch: int, sequence: int, images: int, tokens: int) -> Tensor:
    """Each row: its images' slots, spread evenly with text around them."""
    mask = torch.zeros(batch, sequence, dtype=torch.bool)
    spare = sequence - images * tokens
    for sample in range(batch):
        for image in range(images):
            # Rows differ, as prompts do.
            text_before = min((spare * (image + 1) + sample) // (images + 1), spare)
            start = image * tokens + text_before
            mask[sample, start : start + tokens] = True
    return mask


def row_count(image: Tensor) -> int:
    return math.prod(image.shape[:-1])  # Size.numel() would fix a dynamic shape


def no_rows(rows: Tensor) -> str | None:
    if rows.shape[0] * rows.shape[1] > MAX_ROWS:
        return f"more than {MAX_ROWS} rows"
    if rows.numel() == 0:
        return "an empty sequence or hidden size"
    return None


def check_count(name: str, argument: str, count: int, found: Tensor | int) -> None:
    """Exact where it costs nothing or strictness asks for it; else an assertion on the device."""
    if isinstance(found, Tensor):
        if kernels.is_traced(found):
            return
        if found.is_cuda and not policy.strict:
            message = f"vlm_fast.{name}: {argument} has {count} rows, image_mask another count"
            torch._assert_async(found == count, message)
            return
    if int(found) != count:
        raise ValueError(
            f"vlm_fast.{name}: {argument} has {count} rows, "
            f"expected {int(found)}, the true entries of image_mask"
        )


def likeness(image: Tensor) -> Tensor:
    """The rows and dtype of a tensor without its elements, for its gradient."""
    return image.new_empty(*image.shape[:-1], 0)
