"""Tiles of images of any resolution, packed into rows of tokens: one movement for a whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_fast.kernels import anyres_pack as kernels
from vlm_fast.ops.anyres_plan import MAX_ROWS, ONE, lone_taps, plan
from vlm_fast.ops.anyres_tiling import Tiling, tile_count
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_type, wrong_value
from vlm_fast.ops.declaration import Cost, nbytes, op
from vlm_fast.ops.image_tokens import likeness, row_count


@op
def anyres_pack(
    features: Tensor, image_newline: Tensor | None, source: Tensor, target: Tensor
) -> Tensor:
    """The rows of ``features`` that ``source`` names, in its order, with newlines between.

    Mirrors ``pack_image_features`` of transformers' ``LlavaNextModel`` (unpadding, row order across
    tiles, a newline a row, the base tile first) and the ``cat`` over images after it: call it as
    ``anyres_pack(features, image_newline, *plan.tables)`` with a `vlm_fast.ops.anyres_plan.plan`.

    Args:
        features: ``(..., hidden)``, floating: the rows of all tiles of all images, in order.
        image_newline: ``(hidden,)``, floating, cast to the dtype of ``features``; or None, zeros.
        source: ``(packed,)`` int32, the row of ``features`` each packed row is. Whatever is no row
            of it, as -1, is a newline. No row may be named twice.
        target: ``(rows,)`` int32, its inverse: the packed row of each row of ``features``, -1 for
            one that is cut off. Read for the gradient.

    Returns:
        ``(packed, hidden)`` in the dtype of ``features``, freshly allocated, with gradients to
        ``features`` and ``image_newline``.

    Raises:
        TypeError: an argument is no tensor or of a wrong dtype.
        ValueError: shapes or devices do not fit.
    """
    rows = features.flatten(0, -2)
    is_row = (source >= 0) & (source < rows.shape[0])
    newline = 0 if image_newline is None else image_newline.to(rows.dtype)
    return torch.where(is_row[:, None], rows.index_select(0, source * is_row), newline)


@anyres_pack.accepts
def accepts(features, image_newline, source, target):
    name = "anyres_pack"
    check_rows(name, features, image_newline)
    check_table(name, "source", source, features)
    check_table(name, "target", target, features, row_count(features))
    return features, image_newline, source, target


@anyres_pack.requires
def requires(features, image_newline, source, target):
    return nothing(features, source)


@anyres_pack.forward
def forward(needs, features, image_newline, source, target):
    return kernels.pack_rows(features, source, image_newline), (
        target if needs.features else None,
        source if needs.image_newline else None,
        likeness(features) if needs.features or needs.image_newline else None,
        image_newline.new_empty(0) if needs.image_newline else None,
    )


@anyres_pack.backward
def backward(needs, kept, dy):
    target, source, shape, newline = kept
    dfeatures = dnewline = None
    if needs.features:
        dfeatures = kernels.pack_rows(dy, target, None).view(*shape.shape[:-1], dy.shape[-1])
    if needs.image_newline:
        dnewline = kernels.fill_gradient(dy, source, row_count(shape), newline.dtype)
    return dfeatures, dnewline, None, None


@anyres_pack.cost
def cost(features, image_newline, source, target):
    packed = source.shape[0] * features.shape[-1] * features.element_size()
    read = min(packed, nbytes(features)) + nbytes(image_newline)
    written = nbytes(features, image_newline)
    return Cost(0, packed + read + nbytes(source), 0, packed + written + nbytes(source, target))


@anyres_pack.inputs(
    test=[
        dict(batch=1, side=1, hidden=1, sizes=((2, 1),)),
        dict(batch=3, side=2, hidden=17, sizes=((4, 3), (1, 4), None)),
        dict(batch=1, side=2, hidden=100, sizes=((5, 2),), newline=False),
    ],
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


@op
def anyres_pack_resized(
    features: Tensor,
    image_newline: Tensor | None,
    taps: Tensor,
    weights: Tensor,
    targets: Tensor,
    target_weights: Tensor,
) -> Tensor:
    """As `anyres_pack`, each packed row a weighted sum of four: the stitched grids are resized.

    Mirrors ``pack_image_features`` of transformers' ``LlavaOnevisionModel`` (``anyres_max_9``),
    whose ``interpolate(mode="bilinear")`` runs after the unpadding.

    Args:
        features, image_newline: as of `anyres_pack`.
        taps: ``(packed, 4)`` int32, rows of ``features``; what is no row, as -1, is left out. A
            packed row whose first tap is none is a newline.
        weights: ``(packed, 4)`` int32, of the taps, in units of 2**-30.
        targets, target_weights: ``(rows, 4)`` int32: the same matrix transposed, the packed rows
            that each row of ``features`` is a tap of. Read for the gradient.

    Returns:
        ``(packed, hidden)``; sums are fp32 and rounded once to the dtype of ``features``.

    Raises:
        TypeError, ValueError: as `anyres_pack`.
    """
    rows = features.flatten(0, -2)
    count, wide = rows.shape[0], torch.promote_types(rows.dtype, torch.float32)
    at = torch.where((taps >= 0) & (taps < count), taps, count)
    rows_and_none = torch.cat([rows.to(wide), rows.new_zeros(1, rows.shape[1], dtype=wide)])
    blended = (rows_and_none[at] * (weights.to(wide) / ONE).unsqueeze(-1)).sum(-2)
    newline = 0 if image_newline is None else image_newline.to(rows.dtype)
    return torch.where(at[:, :1] < count, blended.to(rows.dtype), newline)


@anyres_pack_resized.accepts
def accepts_resized(features, image_newline, taps, weights, targets, target_weights):
    name = "anyres_pack_resized"
    check_rows(name, features, image_newline)
    check_table(name, "taps", taps, features, width=(4,))
    packed = taps.shape[0]
    check_table(name, "weights", weights, features, packed, (4,))
    check_table(name, "targets", targets, features, row_count(features), (4,))
    check_table(name, "target_weights", target_weights, features, row_count(features), (4,))
    return features, image_newline, taps, weights, targets, target_weights


@anyres_pack_resized.requires
def requires_resized(features, image_newline, taps, weights, targets, target_weights):
    return nothing(features, taps)


@anyres_pack_resized.forward
def forward_resized(needs, features, image_newline, taps, weights, targets, target_weights):
    return kernels.blend_rows(features, taps, weights, image_newline), (
        targets if needs.features else None,
        target_weights if needs.features else None,
        taps if needs.image_newline else None,
        likeness(features) if needs.features or needs.image_newline else None,
        image_newline.new_empty(0) if needs.image_newline else None,
    )


@anyres_pack_resized.backward
def backward_resized(needs, kept, dy):
    targets, target_weights, taps, shape, newline = kept
    dfeatures = dnewline = None
    if needs.features:
        dfeatures = kernels.blend_rows(dy, targets, target_weights, None)
        dfeatures = dfeatures.view(*shape.shape[:-1], dy.shape[-1])
    if needs.image_newline:
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
    test=[
        dict(batch=1, side=2, hidden=1, sizes=((4, 4),), most=1),
        dict(batch=3, side=2, hidden=17, sizes=((5, 4), (1, 2), None), most=1),
        dict(batch=1, side=2, hidden=100, sizes=((4, 3),), most=1, newline=False),
    ],
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


def check_rows(name, features, image_newline):
    named = dict(features=features, image_newline=image_newline)
    for argument, value in named.items():
        if value is None and argument == "image_newline":
            continue
        if not isinstance(value, Tensor):
            raise not_a_tensor(name, argument, value)
        if not value.is_floating_point():
            raise wrong_type(name, argument, value, "a floating dtype")
    if features.ndim < 2:
        raise wrong_value(name, "features", features, "(..., hidden) of two dimensions or more")
    if image_newline is None:
        return
    if image_newline.shape != features.shape[-1:]:
        wanted = f"{tuple(features.shape[-1:])} to match features[..., {features.shape[-1]}]"
        raise wrong_value(name, "image_newline", image_newline, wanted)
    if image_newline.device != features.device:
        wanted = f"{features.device}, where features is"
        raise wrong_value(name, "image_newline", image_newline, wanted)


def check_table(name, argument, table, features, length=None, width=()):
    if not isinstance(table, Tensor):
        raise not_a_tensor(name, argument, table)
    if table.dtype != torch.int32:
        raise wrong_type(name, argument, table, "torch.int32, as anyres_plan.plan makes it")
    if table.ndim != 1 + len(width) or table.shape[1:] != width:
        raise wrong_value(name, argument, table, f"{('rows', *width)}")
    if length is not None and table.shape[0] != length:
        wanted = f"{(length, *width)}, of a plan for as many rows as there are here"
        raise wrong_value(name, argument, table, wanted)
    if table.device != features.device:
        raise wrong_value(name, argument, table, f"{features.device}, where features is")
    if row_count(features) == 0 and table.shape[0] > 0:
        raise wrong_value(name, argument, table, "no entry, as features has no row")


def nothing(features, table):
    if max(row_count(features), table.shape[0]) > MAX_ROWS:
        return f"more than {MAX_ROWS} rows"
    if table.numel() == 0 or features.shape[-1] == 0:
        return "no packed rows or no features"
    return None
