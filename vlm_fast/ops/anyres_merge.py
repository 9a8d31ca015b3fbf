"""Tiles of images of any resolution, packed and merged into the prompt in one movement."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_fast.kernels import anyres_pack as kernels
from vlm_fast.kernels.image_tokens import clear_image_tokens, image_token_slots
from vlm_fast.ops.anyres_pack import anyres_pack, check_rows, check_table, nothing, sample_plan
from vlm_fast.ops.argument_errors import wrong_value
from vlm_fast.ops.declaration import Cost, nbytes, op
from vlm_fast.ops.image_tokens import check_count, check_sequence, likeness, no_rows, row_count


@op
def anyres_merge(
    inputs_embeds: Tensor,
    features: Tensor,
    image_newline: Tensor | None,
    source: Tensor,
    target: Tensor,
    image_mask: Tensor,
) -> Tensor:
    """``merge_image_tokens(inputs_embeds, anyres_pack(...), image_mask)`` in one movement.

    The packed rows exist nowhere but in their slots.

    Args:
        inputs_embeds, image_mask: as of `merge_image_tokens`.
        features, image_newline, source, target: as of `anyres_pack`; any floating dtype, cast to
            that of ``inputs_embeds``.

    Returns:
        ``(batch, sequence, hidden)`` in the dtype of ``inputs_embeds``, freshly allocated.

    Raises:
        TypeError, ValueError: as of both; the mask must have as many slots as there are packed
            rows. Where that is checked on CUDA is said at `merge_image_tokens`.
    """
    packed = anyres_pack.reference(features, image_newline, source, target)
    return inputs_embeds.masked_scatter(image_mask.unsqueeze(-1), packed.to(inputs_embeds.dtype))


@anyres_merge.accepts
def accepts(inputs_embeds, features, image_newline, source, target, image_mask):
    name = "anyres_merge"
    check_sequence(name, "inputs_embeds", inputs_embeds, image_mask)
    check_rows(name, features, image_newline)
    hidden = inputs_embeds.shape[-1]
    if features.shape[-1] != hidden:
        wanted = f"(..., {hidden}) to match inputs_embeds[..., {hidden}]"
        raise wrong_value(name, "features", features, wanted)
    if features.device != inputs_embeds.device:
        wanted = f"{inputs_embeds.device}, where inputs_embeds is"
        raise wrong_value(name, "features", features, wanted)
    check_table(name, "source", source, features)
    check_table(name, "target", target, features, row_count(features))
    if source.shape[0] > image_mask.numel():
        wanted = f"at most {image_mask.numel()} entries, the positions of image_mask"
        raise wrong_value(name, "source", source, wanted)
    return inputs_embeds, features, image_newline, source, target, image_mask


@anyres_merge.requires
def requires(inputs_embeds, features, image_newline, source, target, image_mask):
    return no_rows(inputs_embeds) or nothing(features, source)


@anyres_merge.forward
def forward(needs, inputs_embeds, features, image_newline, source, target, image_mask):
    slots, found = image_token_slots(image_mask, source.shape[0])
    check_count("anyres_merge", "source", source.shape[0], found)
    out = kernels.merge_packed_rows(
        inputs_embeds, image_mask, slots, features, source, image_newline
    )
    of_images = needs.features or needs.image_newline
    return out, (
        image_mask if needs.inputs_embeds else None,
        slots if needs.inputs_embeds or of_images else None,
        target if needs.features else None,
        source if needs.image_newline else None,
        likeness(features) if of_images else None,
        image_newline.new_empty(0) if needs.image_newline else None,
    )


@anyres_merge.backward
def backward(needs, kept, dy):
    mask, slots, target, source, shape, newline = kept
    dembeds = dfeatures = dnewline = None
    if needs.inputs_embeds:
        dembeds = clear_image_tokens(dy, mask, slots)
    if needs.features:
        dfeatures = kernels.pack_rows(
            dy, target, None, slots=slots, limit=slots.shape[0], dtype=shape.dtype
        ).view(*shape.shape[:-1], dy.shape[-1])
    if needs.image_newline:
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
    test=[
        dict(batch=1, side=1, hidden=1, sizes=((2, 1),), text=1),
        dict(batch=3, side=2, hidden=17, sizes=((4, 3), (1, 4), None), text=5),
        dict(batch=1, side=2, hidden=100, sizes=((5, 2),), text=9, newline=False),
    ],
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
