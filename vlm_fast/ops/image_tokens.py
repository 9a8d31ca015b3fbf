"""Image features into the placeholder slots of a text sequence, and out of them again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_fast.fallback import switches
from vlm_fast.kernels import image_tokens as kernels
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_type, wrong_value
from vlm_fast.ops.declaration import Cost, nbytes, op

MAX_ROWS = 2**31 - 1  # slots are int32


@op
def merge_image_tokens(
    inputs_embeds: Tensor, image_features: Tensor | Sequence[Tensor], image_mask: Tensor
) -> Tensor:
    """``inputs_embeds`` with the rows of ``image_features``, in order, where the mask is true.

    Mirrors ``inputs_embeds.masked_scatter(mask.unsqueeze(-1), features.to(inputs_embeds.dtype))``
    of transformers' LLaVA-type models, with a checked count and without anything of the hidden
    size beside the result. Out of place, deterministic, gradients to both.

    Args:
        inputs_embeds: ``(batch, sequence, hidden)``, floating.
        image_features: ``(..., hidden)``, or a list of such tensors (one an image); any floating
            dtype, cast to that of ``inputs_embeds``.
        image_mask: ``(batch, sequence)``, bool.

    Returns:
        ``(batch, sequence, hidden)`` in the dtype of ``inputs_embeds``, freshly allocated.

    Raises:
        TypeError: an argument is no tensor or of a wrong dtype.
        ValueError: shapes or devices do not fit, or the mask has not as many slots as there are
            feature rows. On CUDA that count is checked on the device, without a synchronisation (a
            device-side assertion), and on the host only under `vlm_fast.strict`.
    """
    hidden = inputs_embeds.shape[-1]
    images = [image_features] if isinstance(image_features, Tensor) else image_features
    rows = [image.reshape(row_count(image), hidden).to(inputs_embeds.dtype) for image in images]
    every = torch.cat(rows) if rows else inputs_embeds.new_empty(0, hidden)
    return inputs_embeds.masked_scatter(image_mask.unsqueeze(-1), every)


@merge_image_tokens.accepts
def accepts(inputs_embeds, image_features, image_mask):
    name = "merge_image_tokens"
    check_sequence(name, "inputs_embeds", inputs_embeds, image_mask)
    if isinstance(image_features, Tensor):
        image_features = [image_features]
    elif not isinstance(image_features, Sequence):
        raise not_a_tensor(name, "image_features", image_features)
    hidden, rows = inputs_embeds.shape[-1], 0
    for i, image in enumerate(image_features):
        argument = "image_features" if len(image_features) == 1 else f"image_features[{i}]"
        if not isinstance(image, Tensor):
            raise not_a_tensor(name, argument, image)
        if image.ndim == 0 or image.shape[-1] != hidden:
            wanted = f"(..., {hidden}) to match inputs_embeds[..., {hidden}]"
            raise wrong_value(name, argument, image, wanted)
        if not image.is_floating_point():
            raise wrong_type(name, argument, image, "a floating dtype")
        if image.device != inputs_embeds.device:
            wanted = f"{inputs_embeds.device}, where inputs_embeds is"
            raise wrong_value(name, argument, image, wanted)
        rows += row_count(image)
    if rows > image_mask.numel():
        raise ValueError(
            f"vlm_fast.{name}: image_features has {rows} rows, expected at most "
            f"{image_mask.numel()}, the positions of image_mask"
        )
    # One empty block stands for no images, so that a gradient path to the features remains.
    features = list(image_features) or [inputs_embeds.new_empty(0, hidden)]
    return inputs_embeds, features, image_mask


@merge_image_tokens.requires
def requires(inputs_embeds, image_features, image_mask):
    return no_rows(inputs_embeds)


@merge_image_tokens.forward
def forward(needs, inputs_embeds, image_features, image_mask):
    count = sum(row_count(image) for image in image_features)
    slots, found = kernels.image_token_slots(image_mask, count)
    check_count("merge_image_tokens", "image_features", count, found)
    out = kernels.merge_image_tokens(inputs_embeds, image_features, image_mask, slots)
    wanted = needs.inputs_embeds or needs.image_features
    return out, (
        image_mask if needs.inputs_embeds else None,
        slots if wanted else None,
        *(likeness(image) if needs.image_features else None for image in image_features),
    )


@merge_image_tokens.backward
def backward(needs, kept, dy):
    mask, slots, *likenesses = kept
    dembeds = kernels.clear_image_tokens(dy, mask, slots) if needs.inputs_embeds else None
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
    test=[
        dict(batch=1, sequence=1, hidden=1, images=1, tokens=1),
        dict(batch=3, sequence=37, hidden=17, images=1, tokens=5),
        dict(batch=2, sequence=50, hidden=100, images=2, tokens=9),
        dict(batch=2, sequence=8, hidden=64, images=2, tokens=4),
        dict(batch=1, sequence=7, hidden=24, images=0, tokens=0),
        dict(batch=2, sequence=30, hidden=40, images=3, tokens=4, as_list=True),
    ],
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


@op
def gather_image_tokens(hidden_states: Tensor, image_mask: Tensor, *, count: int) -> Tensor:
    """The rows of ``hidden_states`` where the mask is true, in order: the inverse of the merge.

    Mirrors ``hidden_states[image_mask]``, without its host synchronisation: the caller, who placed
    the images, says how many rows there are.

    Args:
        hidden_states: ``(batch, sequence, hidden)``, floating.
        image_mask: ``(batch, sequence)``, bool.
        count: how many entries of the mask are true.

    Returns:
        ``(count, hidden)``, freshly allocated, differentiable.

    Raises:
        TypeError, ValueError: as `merge_image_tokens`.
    """
    return hidden_states[image_mask]


@gather_image_tokens.accepts
def gather_accepts(hidden_states, image_mask, *, count):
    name = "gather_image_tokens"
    check_sequence(name, "hidden_states", hidden_states, image_mask)
    if not 0 <= count <= image_mask.numel():
        wanted = f"0 to {image_mask.numel()}, the positions of image_mask"
        raise wrong_value(name, "count", count, wanted)
    return hidden_states, image_mask


@gather_image_tokens.requires
def gather_requires(hidden_states, image_mask, *, count):
    return no_rows(hidden_states)


@gather_image_tokens.forward
def gather_forward(needs, hidden_states, image_mask, *, count):
    slots, found = kernels.image_token_slots(image_mask, count)
    check_count("gather_image_tokens", "count", count, found)
    out = hidden_states.new_empty(count, hidden_states.shape[-1])
    kernels.gather_image_tokens(hidden_states, slots, 0, out)
    return out, (image_mask, slots) if needs.hidden_states else (None, None)


@gather_image_tokens.backward
def gather_backward(needs, kept, dy, *, count):
    mask, slots = kept
    return kernels.place_image_tokens(dy, mask, slots), None


@gather_image_tokens.cost
def gather_cost(hidden_states, image_mask, *, count):
    rows = count * hidden_states.shape[-1] * hidden_states.element_size()
    return Cost(0, 2 * rows + nbytes(image_mask), 0, rows + nbytes(hidden_states, image_mask))


@gather_image_tokens.inputs(
    test=[
        dict(batch=1, sequence=1, hidden=1, images=1, tokens=1, count=1),
        dict(batch=3, sequence=37, hidden=17, images=1, tokens=5, count=15),
        dict(batch=1, sequence=7, hidden=24, images=0, tokens=0, count=0),
    ],
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


def check_sequence(name: str, argument: str, rows: Tensor, mask: Tensor) -> None:
    for label, value in ((argument, rows), ("image_mask", mask)):
        if not isinstance(value, Tensor):
            raise not_a_tensor(name, label, value)
    if rows.ndim != 3:
        raise wrong_value(name, argument, rows, "(batch, sequence, hidden)")
    if not rows.is_floating_point():
        raise wrong_type(name, argument, rows, "a floating dtype")
    if mask.dtype != torch.bool:
        raise wrong_type(name, "image_mask", mask, "torch.bool")
    if mask.shape != rows.shape[:2]:
        wanted = f"{tuple(rows.shape[:2])}, the batch and sequence of {argument}"
        raise wrong_value(name, "image_mask", mask, wanted)
    if mask.device != rows.device:
        raise wrong_value(name, "image_mask", mask, f"{rows.device}, where {argument} is")


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
        if found.is_cuda and not switches.strict:
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
