"""Image tiles of any resolution packed and scattered into the prompt without a packed copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_fast.kernels import anyres_pack as kernels
from vlm_fast.kernels.image_tokens import split_image_tokens
from vlm_fast.ops.anyres_pack import anyres_pack
from vlm_fast.ops.anyres_samples import Sizes, sample_plan, why_not_packed
from vlm_fast.ops.declaration import Cost, nbytes, op
from vlm_fast.ops.image_token_rows import check_count, counts_before_launch, why_not_merged
from vlm_fast.ops.rows import empty_like_rows, row_count


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
    """Pack image tiles as `anyres_pack` does and scatter the rows into ``inputs_embeds``.

    Equal to ``merge_image_tokens(inputs_embeds, anyres_pack(...), image_mask)``, but the packed
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
def fallback_reason(
    inputs_embeds: Tensor, features: Tensor, image_newline: Tensor | None,
    source: Tensor, target: Tensor, image_mask: Tensor,
) -> str | None:  # fmt: skip
    return why_not_merged(inputs_embeds) or why_not_packed(features, source)


@anyres_merge.forward
def forward(
    needs_grad: Any, inputs_embeds: Tensor, features: Tensor, image_newline: Any,
    source: Tensor, target: Tensor, image_mask: Tensor,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:  # fmt: skip
    if counts_before_launch(image_mask):
        check_count("anyres_merge", "source", source.shape[0], image_mask.sum())
    images_needed = needs_grad.features or needs_grad.image_newline
    positions = source.new_empty(source.shape[0]) if images_needed else None
    out = inputs_embeds.new_empty(*inputs_embeds.shape)
    found = kernels.merge_packed_rows(
        inputs_embeds, image_mask, features, source, image_newline, out, positions
    )
    check_count("anyres_merge", "source", source.shape[0], found)
    return out, (
        image_mask if needs_grad.inputs_embeds else None,
        positions,
        target if needs_grad.features else None,
        source if needs_grad.image_newline else None,
        empty_like_rows(features) if images_needed else None,
        image_newline.new_empty(0) if needs_grad.image_newline else None,
    )


@anyres_merge.backward
def backward(needs_grad: Any, saved_tensors: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    mask, positions, target, source, rows, newline = saved_tensors
    dembeds = dfeatures = dnewline = None
    if needs_grad.inputs_embeds:
        dembeds = dy.new_empty(*dy.shape)
        split_image_tokens(dy, mask, dembeds, [])
    if needs_grad.features:
        dfeatures = kernels.pack_rows(
            dy, target, None, slots=positions, limit=positions.shape[0], dtype=rows.dtype
        ).view(*rows.shape[:-1], dy.shape[-1])
    if needs_grad.image_newline:
        dnewline = kernels.fill_gradient(
            dy, source, row_count(rows), newline.dtype, slots=positions
        )
    return dembeds, dfeatures, dnewline, None, None, None


@anyres_merge.cost
def cost(
    inputs_embeds: Tensor, features: Tensor, image_newline: Tensor | None,
    source: Tensor, target: Tensor, image_mask: Tensor,
) -> Cost:  # fmt: skip
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
def inputs(
    batch: int, side: int, hidden: int, sizes: Sizes, text: int, *, newline: bool = True
) -> tuple[Tensor | None, ...]:
    tables, counts, tiles = sample_plan(batch, side, sizes, newline)
    sequence = max(counts, default=0) + text
    # Half of the text stands before the image, and one more token in each further sample.
    starts = [(text // 2 + i) % (text + 1) for i in range(batch)]
    ranges = zip(starts, counts, strict=True)
    mask = torch.zeros(batch, sequence, dtype=torch.bool)
    for row, (start, count) in zip(mask, ranges, strict=True):
        row[start : start + count] = True
    features = torch.randn(tiles, side**2, hidden)
    newlines = torch.randn(hidden) if newline else None
    return torch.randn(batch, sequence, hidden), features, newlines, *tables, mask
