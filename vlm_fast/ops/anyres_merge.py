"""Tiles of images of any resolution, packed and merged into the prompt in one movement."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_fast.kernels import anyres_pack as kernels
from vlm_fast.kernels.image_tokens import clear_image_tokens, image_token_slots
from vlm_fast.ops.anyres_pack import anyres_pack, nothing, sample_plan
from vlm_fast.ops.declaration import Cost, nbytes, op
from vlm_fast.ops.image_tokens import check_count, likeness, no_rows, row_count


@op(
    inputs_embeds="floating (batch, sequence, hidden)",
    features="floating (*rows, hidden)",
    image_newline="floating (hidden) or None",
    source="int32 (packed)",
    target="int32 (prod(rows))",
    image_mask="bool (batch, sequence)",
    where={
        "len(rows) > 0": "features: (..., hidden) of two dimensions or more",
        "prod(rows) > 0 or packed == 0": "source: no entry, because features has no row",
        "packed <= batch * sequence": (
            "source: at most {batch * sequence} entries, the positions of image_mask"
        ),
    },
)
def anyres_merge(
    inputs_embeds: Tensor,
    features: Tensor,
    image_newline: Tensor | None,
    source: Tensor,
    target: Tensor,
    image_mask: Tensor,
) -> Tensor:
    """Pack tiles and merge them into the prompt in one movement.

    The same as ``merge_image_tokens(inputs_embeds, anyres_pack(...), image_mask)``, but the packed
    rows exist only at their positions in the result.

    Args:
        features: The rows of all tiles of all images, in order; cast to the dtype of
            ``inputs_embeds``.
        image_newline: The row between packed rows, cast to the dtype of ``features``; None gives
            zeros.
        source: The row of ``features`` that each packed row copies, as for `anyres_pack`.
        target: The packed row of each row of ``features``, as for `anyres_pack`.
        image_mask: True at the positions that take the packed rows, in order.

    Returns:
        ``(batch, sequence, hidden)`` in the dtype of ``inputs_embeds``, freshly allocated.

    Raises:
        ValueError: Also if the mask has not as many True entries as there are packed rows, as
            `merge_image_tokens` checks it.
    """
    packed = anyres_pack.reference(features, image_newline, source, target)
    return inputs_embeds.masked_scatter(image_mask.unsqueeze(-1), packed.to(inputs_embeds.dtype))


@anyres_merge.fallback_reason
def fallback_reason(inputs_embeds, features, image_newline, source, target, image_mask):
    return no_rows(inputs_embeds) or nothing(features, source)


@anyres_merge.forward
def forward(needs_grad, inputs_embeds, features, image_newline, source, target, image_mask):
    slots, found = image_token_slots(image_mask, source.shape[0])
    check_count("anyres_merge", "source", source.shape[0], found)
    out = kernels.merge_packed_rows(
        inputs_embeds, image_mask, slots, features, source, image_newline
    )
    of_images = needs_grad.features or needs_grad.image_newline
    return out, (
        image_mask if needs_grad.inputs_embeds else None,
        slots if needs_grad.inputs_embeds or of_images else None,
        target if needs_grad.features else None,
        source if needs_grad.image_newline else None,
        likeness(features) if of_images else None,
        image_newline.new_empty(0) if needs_grad.image_newline else None,
    )


@anyres_merge.backward
def backward(needs_grad, saved_tensors, dy):
    mask, slots, target, source, shape, newline = saved_tensors
    dembeds = dfeatures = dnewline = None
    if needs_grad.inputs_embeds:
        dembeds = clear_image_tokens(dy, mask, slots)
    if needs_grad.features:
        dfeatures = kernels.pack_rows(
            dy, target, None, slots=slots, limit=slots.shape[0], dtype=shape.dtype
        ).view(*shape.shape[:-1], dy.shape[-1])
    if needs_grad.image_newline:
        dnewline = kernels.fill_gradient(dy, source, row_count(shape), newline.dtype, slots=slots)
    return dembeds, dfeatures, dnewline, None, None, None


@anyres_merge.cost
def cost(inputs_embeds, features, image_newline, source, target, image_mask):
    hidden, packed = features.shape[-1], source.shape[0]
    text = (image_mask.numel() - packed) * hidden * inputs_embeds.element_size()
    read = min(packed * hidden * features.element_size(), nbytes(features))
    moved = nbytes(inputs_embeds, image_newline, image_mask, source) + text
    return Cost(0, moved + read, 0, moved + nbytes(features, target))


@anyres_merge.inputs(
    smallest=dict(batch=1, side=1, hidden=1, sizes=((2, 1),), text=1),
    usual=dict(batch=3, side=2, hidden=17, sizes=((4, 3), (1, 4), None), text=5),
    others=[
        dict(batch=1, side=2, hidden=100, sizes=((5, 2),), text=9, newline=False),
    ],
    large=dict(batch=5, side=54, hidden=4100, sizes=((324, 324),), text=576),
    bitwise=True,
    large_along="features",
    bench={
        "LLaVA-NeXT, 8 x 4096": dict(
            batch=8, side=24, hidden=4096, sizes=((48, 48),), text=4096 - 2928
        ),
        "LLaVA-NeXT, 4 x 3072": dict(
            batch=4, side=24, hidden=4096, sizes=((48, 48),), text=3072 - 2928
        ),
    },
)
def inputs(batch, side, hidden, sizes, text, *, newline=True):
    tables, counts, tiles = sample_plan(batch, side, sizes, newline)
    sequence = max(counts, default=0) + text
    # Before the image half of the text, and one token more in every next row.
    starts = [(text // 2 + i) % (text + 1) for i in range(batch)]
    ranges = zip(starts, counts, strict=True)
    mask = torch.zeros(batch, sequence, dtype=torch.bool)
    for row, (start, count) in zip(mask, ranges, strict=True):
        row[start : start + count] = True
    features = torch.randn(tiles, side**2, hidden)
    newlines = torch.randn(hidden) if newline else None
    return torch.randn(batch, sequence, hidden), features, newlines, *tables, mask
