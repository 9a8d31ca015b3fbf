"""Calls of `qformer_layer` for tests and benchmarks, and what they cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_fast.ops.cost import Cost, nbytes
from vlm_fast.ops.qformer_layer_parameters import MLP, SELF, Blocks, parameter_shapes, split

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
        dict(
            batch=2, tokens=11, text=4, features=24, inner=40, keys=7, masked=True, heads=3,
            dropout=0.25, attention_dropout=0.1,
        ),
        dict(batch=2, tokens=5, text=5, features=24, inner=40, heads=2),
    ],
    large=dict(batch=5, tokens=107_000, features=64, inner=4096, heads=1),
    bench={
        "BLIP-2 Q-Former, 1 image": dict(
            batch=1, tokens=32, features=768, inner=3072, keys=257, heads=12
        ),
        "BLIP-2 Q-Former, 16 images": dict(
            batch=16, tokens=32, features=768, inner=3072, keys=257, heads=12
        ),
        "InstructBLIP Q-Former, 16 images": dict(
            batch=16, tokens=64, text=32, features=768, inner=3072, keys=257, heads=12
        ),
    },
)  # fmt: skip


def inputs(
    batch: int, tokens: int, features: int, inner: int, *, text: int = 0, keys: int = 0,
    per_image: int = 1, shared_by: int = 0, masked: bool = False, biased: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """Random arguments; without ``keys`` the layer has no cross-attention.

    text: how many of the tokens are text; per_image: the sequences of an image; shared_by: the
    images that share one sequence.
    """
    images = shared_by or batch // per_image

    def mask(count: int, length: int) -> Tensor | None:
        return torch.rand(count, length) < 0.7 if masked and length else None

    return (
        torch.randn(batch, tokens, features),
        torch.randn(images, keys, 2 * features) if keys else None,
        _parameters(features, inner, keys > 0, text < tokens, text > 0),
        torch.randn(1, 1, tokens, tokens) if biased else None,
        mask(batch, tokens), mask(images, keys), torch.arange(20261, 20267),
    )  # fmt: skip


def _parameters(
    width: int, inner: int, has_image: bool, has_queries: bool, has_text: bool
) -> list[Tensor]:
    """Random parameters; the weights of norms are near 1."""
    inners = inner if has_queries else (), inner if has_text else ()
    shapes = parameter_shapes(width, Blocks((), 0 if has_image else (), *inners))
    norms = {end - 2 for end in range(SELF, len(shapes) + 1, MLP)}
    return [
        torch.randn(shape) * shape[1] ** -0.5
        if len(shape) == 2
        else torch.randn(shape) * 0.1 + (i in norms)
        for i, shape in enumerate(shapes)
    ]


def cost(
    hidden: Tensor, image_kv: Tensor | None, parameters: list[Tensor], *others: Any,
    text: int, **options: Any,
) -> Cost:  # fmt: skip
    """The cost of a call: products, and each tensor read or written once."""
    batch, tokens, features = hidden.shape
    images, keys = (0, 0) if image_kv is None else image_kv.shape[:2]
    shared, queries = batch == 1 and images > 1, max(batch, images) * (tokens - text)
    blocks = split(parameters, image_kv is not None, text < tokens)
    rows = batch * tokens, queries, queries, batch * text
    weights = sum(n * sum(p.numel() for p in block) for n, block in zip(rows, blocks, strict=True))
    scores = batch * tokens * tokens + (images if shared else batch) * (tokens - text) * keys
    inner = sum(n * p[0].shape[0] for n, p in zip(rows[2:], blocks[2:], strict=True) if p)
    written = ((queries + batch * text) * features + inner) * hidden.element_size()
    moved = nbytes(hidden, image_kv, *parameters) + written
    flops = 2 * weights + 4 * scores * features
    return Cost(flops, moved, 2 * flops, 2 * moved)
