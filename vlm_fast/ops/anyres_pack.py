"""Tiles of images of any resolution, packed into rows of tokens: one movement for a whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_fast.kernels import anyres_pack as kernels
from vlm_fast.ops.anyres_plan import MAX_ROWS, ONE, lone_taps, plan
from vlm_fast.ops.anyres_tiling import Tiling, tile_count
from vlm_fast.ops.declaration import Cost, nbytes, op
from vlm_fast.ops.image_tokens import likeness, row_count


@op(
    features="floating (*rows, hidden)",
    image_newline="floating (hidden) or None",
    source="int32 (packed)",
    target="int32 (prod(rows))",
    where={
        "len(rows) > 0": "features: (..., hidden) of two dimensions or more",
        "prod(rows) > 0 or packed == 0": "source: no entry, because features has no row",
    },
)
def anyres_pack(
    features: Tensor, image_newline: Tensor | None, source: Tensor, target: Tensor
) -> Tensor:
    """Pack the tiles of images of any resolution into rows of tokens, with newlines between.

    Mirrors ``pack_image_features`` of transformers' ``LlavaNextModel`` (unpadding, row order across
    tiles, a newline after each row, the base tile first) and the concatenation over images after
    it. Call it as ``anyres_pack(features, image_newline, *plan.tables)`` with a plan of
    `vlm_fast.ops.anyres_plan.plan`.

    Args:
        features: The rows of all tiles of all images, in order.
        image_newline: The row between packed rows, cast to the dtype of ``features``; None gives
            zeros.
        source: The row of ``features`` that each packed row copies. A number that is no row, such
            as -1, is a newline. No row may be named twice.
        target: The inverse: the packed row of each row of ``features``, -1 for a row that is cut
            off. Read by backward.

    Returns:
        ``(packed, hidden)`` in the dtype of ``features``, freshly allocated, with gradients to
        ``features`` and ``image_newline``.
    """
    rows = features.flatten(0, -2)
    is_row = (source >= 0) & (source < rows.shape[0])
    newline = 0 if image_newline is None else image_newline.to(rows.dtype)
    return torch.where(is_row[:, None], rows.index_select(0, source * is_row), newline)


@anyres_pack.fallback_reason
def fallback_reason(features, image_newline, source, target):
    return nothing(features, source)


@anyres_pack.forward
def forward(needs_grad, features, image_newline, source, target):
    return kernels.pack_rows(features, source, image_newline), (
        target if needs_grad.features else None,
        source if needs_grad.image_newline else None,
        likeness(features) if needs_grad.features or needs_grad.image_newline else None,
        image_newline.new_empty(0) if needs_grad.image_newline else None,
    )


@anyres_pack.backward
def backward(needs_grad, saved_tensors, dy):
    target, source, shape, newline = saved_tensors
    dfeatures = dnewline = None
    if needs_grad.features:
        dfeatures = kernels.pack_rows(dy, target, None).view(*shape.shape[:-1], dy.shape[-1])
    if needs_grad.image_newline:
        dnewline = kernels.fill_gradient(dy, source, row_count(shape), newline.dtype)
    return dfeatures, dnewline, None, None


@anyres_pack.cost
def cost(features, image_newline, source, target):
    packed = source.shape[0] * features.shape[-1] * features.element_size()
    read = min(packed, nbytes(features)) + nbytes(image_newline)
    written = nbytes(features, image_newline)
    return Cost(0, packed + read + nbytes(source), 0, packed + written + nbytes(source, target))


@anyres_pack.inputs(
    smallest=dict(batch=1, side=1, hidden=1, sizes=((2, 1),)),
    usual=dict(batch=3, side=2, hidden=17, sizes=((4, 3), (1, 4), None)),
    others=[
        dict(batch=1, side=2, hidden=100, sizes=((5, 2),), newline=False),
    ],
    large=dict(batch=5, side=54, hidden=4100, sizes=((324, 324),)),
    bitwise=True,
    large_along="features",
    bench={
        "LLaVA-NeXT, 16 x 2928": dict(batch=16, side=24, hidden=4096, sizes=((48, 48),)),
        "LLaVA-NeXT, 1 x 2928": dict(batch=1, side=24, hidden=4096, sizes=((48, 48),)),
        "LLaVA-NeXT, oblong, 8": dict(batch=8, side=24, hidden=4096, sizes=((48, 31), (20, 72))),
    },
)
def inputs(batch, side, hidden, sizes, *, newline=True):
    tables, _, tiles = sample_plan(batch, side, sizes, newline)
    features = torch.randn(tiles, side**2, hidden)
    return features, torch.randn(hidden) if newline else None, *tables


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
    rows_and_none = torch.cat([rows.to(wide), rows.new_zeros(1, rows.shape[1], dtype=wide)])
    blended = (rows_and_none[at] * (weights.to(wide) / ONE).unsqueeze(-1)).sum(-2)
    newline = 0 if image_newline is None else image_newline.to(rows.dtype)
    return torch.where(at[:, :1] < count, blended.to(rows.dtype), newline)


@anyres_pack_resized.fallback_reason
def fallback_reason_resized(features, image_newline, taps, weights, targets, target_weights):
    return nothing(features, taps)


@anyres_pack_resized.forward
def forward_resized(needs_grad, features, image_newline, taps, weights, targets, target_weights):
    return kernels.blend_rows(features, taps, weights, image_newline), (
        targets if needs_grad.features else None,
        target_weights if needs_grad.features else None,
        taps if needs_grad.image_newline else None,
        likeness(features) if needs_grad.features or needs_grad.image_newline else None,
        image_newline.new_empty(0) if needs_grad.image_newline else None,
    )


@anyres_pack_resized.backward
def backward_resized(needs_grad, saved_tensors, dy):
    targets, target_weights, taps, shape, newline = saved_tensors
    dfeatures = dnewline = None
    if needs_grad.features:
        dfeatures = kernels.blend_rows(dy, targets, target_weights, None)
        dfeatures = dfeatures.view(*shape.shape[:-1], dy.shape[-1])
    if needs_grad.image_newline:
        dnewline = kernels.fill_gradient(dy, taps.select(1, 0), row_count(shape), newline.dtype)
    return dfeatures, dnewline, None, None, None, None


@anyres_pack_resized.cost
def cost_resized(features, image_newline, taps, weights, targets, target_weights):
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
def inputs_resized(batch, side, hidden, sizes, most, *, newline=True):
    tables, _, tiles = sample_plan(batch, side, sizes, newline, most)
    if len(tables) == 2:  # nothing is resized
        tables = [part for table in tables for part in lone_taps(table)]
    features = torch.randn(tiles, side**2, hidden)
    return features, torch.randn(hidden) if newline else None, *tables


def sample_plan(batch, side, sizes, newline, most=None):
    """Tables and counts of ``batch`` images of these sizes in tokens, None for one tile; tiles."""
    pinpoints = tuple((i * side, j * side) for i in range(1, 7) for j in range(1, 7))
    tiling = Tiling(pinpoints, side, side, most, newline)
    images = [sizes[i % len(sizes)] for i in range(batch)]
    tiles = [1 if size is None else tile_count(size, tiling) for size in images]
    known = [size or (side, side) for size in images]
    made = plan(known, tiling, tiles=tiles, device=torch.get_default_device())
    return [table.clone() for table in made.tables], made.counts, sum(tiles)


def nothing(features, table):
    if max(row_count(features), table.shape[0]) > MAX_ROWS:
        return f"more than {MAX_ROWS} rows"
    if table.numel() == 0 or features.shape[-1] == 0:
        return "no packed rows or no features"
    return None
