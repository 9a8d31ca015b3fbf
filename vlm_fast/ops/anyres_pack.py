"""Image tiles of any resolution packed into rows of tokens, with newlines between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_fast.kernels import anyres_pack as kernels
from vlm_fast.ops.anyres_samples import Sizes, sample_plan, why_not_packed
from vlm_fast.ops.declaration import Cost, nbytes, op
from vlm_fast.ops.rows import empty_like_rows, row_count


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
    """Pack the tiles of images of any resolution into rows of tokens, with newlines between them.

    Mirrors ``pack_image_features`` of transformers' ``LlavaNextModel`` (unpadding, row order across
    tiles, a newline after each row, the base tile first) and the concatenation over images after
    it. Call it as ``anyres_pack(features, image_newline, *plan.tables)`` with a plan of
    `vlm_fast.ops.anyres_plan.plan`.

    Args:
        features: The rows of all tiles of all images, in order.
        image_newline: The row between packed rows, cast to the dtype of ``features``; None gives
            zeros.
        source: The row of ``features`` that each packed row copies. A number that is no row, such
            as -1, gives a newline. Each row may occur once.
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
def fallback_reason(
    features: Tensor, image_newline: Tensor | None, source: Tensor, target: Tensor
) -> str | None:
    return why_not_packed(features, source)


@anyres_pack.forward
def forward(
    needs_grad: Any, features: Tensor, image_newline: Any, source: Tensor, target: Tensor
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    return kernels.pack_rows(features, source, image_newline), (
        target if needs_grad.features else None,
        source if needs_grad.image_newline else None,
        empty_like_rows(features) if needs_grad.features or needs_grad.image_newline else None,
        image_newline.new_empty(0) if needs_grad.image_newline else None,
    )


@anyres_pack.backward
def backward(needs_grad: Any, saved_tensors: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    target, source, rows, newline = saved_tensors
    dfeatures = dnewline = None
    if needs_grad.features:
        dfeatures = kernels.pack_rows(dy, target, None).view(*rows.shape[:-1], dy.shape[-1])
    if needs_grad.image_newline:
        dnewline = kernels.fill_gradient(dy, source, row_count(rows), newline.dtype)
    return dfeatures, dnewline, None, None


@anyres_pack.cost
def cost(features: Tensor, image_newline: Tensor | None, source: Tensor, target: Tensor) -> Cost:
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
def inputs(
    batch: int, side: int, hidden: int, sizes: Sizes, *, newline: bool = True
) -> tuple[Tensor | None, ...]:
    tables, _, tiles = sample_plan(batch, side, sizes, newline)
    features = torch.randn(tiles, side**2, hidden)
    return features, torch.randn(hidden) if newline else None, *tables
