"""Calls of `qformer_layer` for tests and benchmarks, and what they cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_fast.ops.cost import Cost, nbytes
from vlm_fast.ops.qformer_layer_parameters import MLP, SELF, parameter_shapes

SHAPES: dict[str, Any] = dict(
    smallest=dict(batch=1, tokens=1, features=2, inner=1, heads=1, eps=0.01),
    usual=dict(batch=3, tokens=5, features=24, inner=40, keys=17, masked=True, heads=2),
    others=[
        dict(batch=2, tokens=33, features=48, inner=72, heads=3, biased=True, scale=0.3),
        dict(
            batch=2, tokens=9, features=32, inner=40, keys=257, heads=2, dropout=0.25,
            attention_dropout=0.1, activation="gelu_tanh",
        ),
        dict(batch=1, tokens=5, features=24, inner=40, shared_by=3, keys=7, heads=2),
        dict(batch=4, tokens=5, features=24, inner=40, per_image=2, keys=7, masked=True, heads=3),
    ],
    large=dict(batch=5, tokens=107_000, features=64, inner=4096, heads=1),
    bench={
        "BLIP-2 Q-Former, 1 image": dict(
            batch=1, tokens=32, features=768, inner=3072, keys=257, heads=12
        ),
        "BLIP-2 Q-Former, 16 images": dict(
            batch=16, tokens=32, features=768, inner=3072, keys=257, heads=12
        ),
    },
)  # fmt: skip


def inputs(
    batch: int, tokens: int, features: int, inner: int, *, keys: int = 0, per_image: int = 1,
    shared_by: int = 0, masked: bool = False, biased: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """Random arguments; without ``keys`` the layer has no cross-attention.

    per_image: the sequences of an image; shared_by: the images that share one sequence.
    """
    images = shared_by or batch // per_image

    def mask(count: int, length: int) -> Tensor | None:
        return torch.rand(count, length) < 0.7 if masked and length else None

    return (
        torch.randn(batch, tokens, features),
        torch.randn(images, keys, 2 * features) if keys else None,
        _parameters(features, inner, keys > 0),
        torch.randn(1, 1, tokens, tokens) if biased else None,
        mask(batch, tokens), mask(images, keys), torch.arange(20261, 20266),
    )  # fmt: skip


def _parameters(width: int, inner: int, has_image: bool) -> list[Tensor]:
    """Random parameters; the weights of norms are near 1."""
    shapes = parameter_shapes(width, inner, has_image)
    norms = {SELF - 2, len(shapes) - MLP - 2, len(shapes) - 2}
    return [
        torch.randn(shape) * shape[1] ** -0.5
        if len(shape) == 2
        else torch.randn(shape) * 0.1 + (i in norms)
        for i, shape in enumerate(shapes)
    ]


def cost(
    hidden: Tensor, image_kv: Tensor | None, parameters: list[Tensor], *others: Any, **options: Any
) -> Cost:
    """The cost of a call: products, and each tensor read or written once."""
    batch, tokens, features = hidden.shape
    images, keys = (0, 0) if image_kv is None else image_kv.shape[:2]
    shared, rows = batch == 1 and images > 1, max(batch, images) * tokens
    before = batch * tokens * sum(p.numel() for p in parameters[:SELF])
    weights = before + rows * sum(p.numel() for p in parameters[SELF:])
    scores = batch * tokens * tokens + (images if shared else batch) * tokens * keys
    written = rows * (features + parameters[-MLP].shape[0]) * hidden.element_size()
    moved = nbytes(hidden, image_kv, *parameters) + written
    flops = 2 * weights + 4 * scores * features
    return Cost(flops, moved, 2 * flops, 2 * moved)
