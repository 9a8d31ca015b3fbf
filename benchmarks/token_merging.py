"""Token Merging (arXiv 2210.09461): pairs of similar tokens become their mean.

``before`` is plain PyTorch: normalise, product, max, argsort, gather, scatter_reduce, cat.
``after`` is `vlm_fast.ops.bipartite_match` and ``merge_tokens``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlm_fast import ops
from vlm_fast.benchmarks.before_and_after import Part, measure, with_gradients, without_gradients
from vlm_fast.modules import MLPProjector, TokenMerger


def plain_merging(x: Tensor, metric: Tensor, r: int) -> Tensor:
    """The steps of the paper in plain PyTorch."""
    with torch.no_grad():
        unit = metric / metric.norm(dim=-1, keepdim=True)
        best, nearest = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)
        edges = best.argsort(dim=-1, descending=True).unsqueeze(-1)
        left, gone = edges[:, r:].sort(dim=1).values, edges[:, :r]
        target = nearest.unsqueeze(-1).gather(1, gone)
    a, b, features = x[:, ::2], x[:, 1::2], x.shape[-1]
    unmerged = a.gather(1, left.expand(-1, -1, features))
    merging = a.gather(1, gone.expand(-1, -1, features))
    b = b.scatter_reduce(1, target.expand(-1, -1, features), merging, reduce="mean")
    return torch.cat([unmerged, b], 1)


def fused_merging(x: Tensor, metric: Tensor, r: int) -> Tensor:
    """The same with two ops."""
    return ops.merge_tokens(x, ops.bipartite_match(metric, r=r))[0]


def half_of_clip(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Part]:
    """Merge 576 tokens of CLIP-L/336 into 288, by their own similarity and by keys of width 64."""
    images = 2 if quick else (32 if device == "cpu" else 64)
    x = torch.randn(images, 576, 1024, device=device, dtype=dtype, requires_grad=True)
    keys = torch.randn(images, 576, 64, device=device, dtype=dtype)
    upstream = torch.randn(images, 288, 1024, device=device, dtype=dtype)
    for words, metric in (("themselves", x), ("keys of 64", keys)):
        called = {
            "before": partial(plain_merging, x, metric, 288),
            "after": partial(fused_merging, x, metric, 288),
        }
        if device == "cuda":
            torch._dynamo.reset()
            called["compiled"] = partial(torch.compile(plain_merging), x, metric, 288)
        name = f"{images} x 576 x 1024 to 288, by {words}"
        yield Part(f"{name}, forward", without_gradients(called))
        steps = with_gradients(called, [x], upstream)
        yield Part(f"{name}, forward and backward", steps, [x, keys])


def before_a_projector(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Part]:
    """LLaVA-1.5's projector on all tokens, and on the quarter that a `TokenMerger` keeps."""
    width, images = (512, 1) if quick else (4096, 1 if device == "cpu" else 16)
    with torch.device(device):
        projector = MLPProjector(1024, width).to(dtype)
        x = torch.randn(images, 576, 1024, dtype=dtype)
    merged = torch.nn.Sequential(TokenMerger(ratio=4), projector)
    called = {"before": partial(projector, x), "after": partial(merged, x)}
    name = f"LLaVA's projector of {images} x 576, after a merge to 144"
    yield Part(name, without_gradients(called))


PARTS = (half_of_clip, before_a_projector)


def main(**options: Any) -> dict[str, Any]:
    """See `before_and_after.measure`."""
    return measure("Tokens", PARTS, **options)
