"""Image tiles of any resolution stitched, resized bilinearly and packed into rows of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_fast.kernels import anyres_pack as kernels
from vlm_fast.ops.anyres_plan import ONE, single_taps
from vlm_fast.ops.anyres_samples import Sizes, sample_plan, why_not_packed
from vlm_fast.ops.declaration import Cost, nbytes, op
from vlm_fast.ops.rows import empty_like_rows, row_count


@op(
    features="floating (*rows, hidden)",
    image_newline="floating (hidden) or None",
    taps="int32 (packed, 4)",
    weights="int32 (packed, 4)",
    targets="int32 (prod(rows), 4)",
    target_weights="int32 (prod(rows), 4)",
    where={
        "len(rows) > 0": "features: (..., hidden) of two dimensions or more",
        "prod(rows) > 0 or packed == 0": "taps: no entry, because features has no row",
    },
)
def anyres_pack_resized(
    features: Tensor,
    image_newline: Tensor | None,
    taps: Tensor,
    weights: Tensor,
    targets: Tensor,
    target_weights: Tensor,
) -> Tensor:
    """Pack tiles as `anyres_pack` does, and resize each stitched grid bilinearly.

    Each packed row is a weighted sum of four rows of ``features``. Mirrors ``pack_image_features``
    of transformers' ``LlavaOnevisionModel`` (``anyres_max_9``), whose
    ``interpolate(mode="bilinear")`` runs after the unpadding. Sums are fp32 and rounded once.

    Args:
        features: The rows of all tiles of all images, in order.
        image_newline: The row between packed rows, cast to the dtype of ``features``; None gives
            zeros.
        taps: Rows of ``features``. A number that is no row, such as -1, adds nothing; if the first
            tap is no row, the packed row is a newline.
        weights: Weights of the taps, in units of 2**-30.
        targets: The transposed matrix: the packed rows that each row of ``features`` is a tap of.
            Read by backward, with ``target_weights``.

    Returns:
        ``(packed, hidden)`` in the dtype of ``features``.
    """
    rows = features.flatten(0, -2)
    count, wide = rows.shape[0], torch.promote_types(rows.dtype, torch.float32)
    at = torch.where((taps >= 0) & (taps < count), taps, count)
    rows_and_zeros = torch.cat([rows.to(wide), rows.new_zeros(1, rows.shape[1], dtype=wide)])
    blended = (rows_and_zeros[at] * (weights.to(wide) / ONE).unsqueeze(-1)).sum(-2)
    newline = 0 if image_newline is None else image_newline.to(rows.dtype)
    return torch.where(at[:, :1] < count, blended.to(rows.dtype), newline)


@anyres_pack_resized.fallback_reason
def fallback_reason(
    features: Tensor, image_newline: Tensor | None, taps: Tensor, weights: Tensor,
    targets: Tensor, target_weights: Tensor,
) -> str | None:  # fmt: skip
    return why_not_packed(features, taps)


@anyres_pack_resized.forward
def forward(
    needs_grad: Any, features: Tensor, image_newline: Any, taps: Tensor, weights: Tensor,
    targets: Tensor, target_weights: Tensor,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:  # fmt: skip
    return kernels.blend_rows(features, taps, weights, image_newline), (
        targets if needs_grad.features else None,
        target_weights if needs_grad.features else None,
        taps if needs_grad.image_newline else None,
        empty_like_rows(features) if needs_grad.features or needs_grad.image_newline else None,
        image_newline.new_empty(0) if needs_grad.image_newline else None,
    )


@anyres_pack_resized.backward
def backward(needs_grad: Any, saved_tensors: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    targets, target_weights, taps, rows, newline = saved_tensors
    dfeatures = dnewline = None
    if needs_grad.features:
        dfeatures = kernels.blend_rows(dy, targets, target_weights, None)
        dfeatures = dfeatures.view(*rows.shape[:-1], dy.shape[-1])
    if needs_grad.image_newline:
        dnewline = kernels.fill_gradient(dy, taps.select(1, 0), row_count(rows), newline.dtype)
    return dfeatures, dnewline, None, None, None, None


@anyres_pack_resized.cost
def cost(
    features: Tensor, image_newline: Tensor | None, taps: Tensor, weights: Tensor,
    targets: Tensor, target_weights: Tensor,
) -> Cost:  # fmt: skip
    packed = taps.shape[0] * features.shape[-1]
    both = packed * features.element_size() + nbytes(features, image_newline)
    flops = 8 * packed, 8 * features.numel()
    tables = nbytes(taps, weights), nbytes(targets, target_weights)
    return Cost(flops[0], both + tables[0], flops[1], both + tables[1])


@anyres_pack_resized.inputs(
    smallest=dict(batch=1, side=2, hidden=1, sizes=((4, 4),), most=1),
    usual=dict(batch=3, side=2, hidden=17, sizes=((5, 4), (1, 2), None), most=1),
    others=[
        dict(batch=1, side=2, hidden=100, sizes=((4, 3),), most=1, newline=False),
    ],
    large=dict(batch=5, side=54, hidden=4100, sizes=((324, 324),), most=9),
    bitwise=True,
    large_along="features",
    bench={
        "LLaVA-OneVision, 8 x 17 tiles": dict(
            batch=8, side=27, hidden=3584, sizes=((108, 108),), most=9
        ),
        "LLaVA-OneVision, 1 x 37 tiles": dict(
            batch=1, side=27, hidden=3584, sizes=((162, 162),), most=9
        ),
    },
)
def inputs(
    batch: int, side: int, hidden: int, sizes: Sizes, most: int, *, newline: bool = True
) -> tuple[Tensor | None, ...]:
    tables, _, tiles = sample_plan(batch, side, sizes, newline, most)
    if len(tables) == 2:  # nothing is resized
        tables = [part for table in tables for part in single_taps(table)]
    features = torch.randn(tiles, side**2, hidden)
    return features, torch.randn(hidden) if newline else None, *tables
