"""Average, maximum or bilinear pooling of a grid of image tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels import spatial_pool as kernels
from vlm_fast.kernels._launcher import dense
from vlm_fast.kernels.spatial_pool import Pooling
from vlm_fast.ops.declaration import Cost, nbytes, op

NAME = "spatial_pool"
MODES = ("avg", "max", "bilinear")
MAX_STRIDE = 8


@op(
    x="floating (..., height * width, features)",
    height="int from 1",
    width="int from 1",
    mode=MODES,
    stride=f"int from 1 to {MAX_STRIDE}",
    where={
        "mode == 'bilinear' or height >= stride": "height: {stride} or more, at this stride",
        "mode == 'bilinear' or width >= stride": "width: {stride} or more, at this stride",
        "x.ndim > 2": "x: (..., {height * width}, features) of three dimensions or more",
    },
)
def spatial_pool(
    x: Tensor, *, height: int, width: int, mode: str = "avg", stride: int = 2
) -> Tensor:
    """Pool a grid of tokens by ``stride x stride`` windows.

    Mirrors the pooling of transformers' LLaVA-NeXT-Video ("avg", "max"), LLaVA-OneVision
    ("bilinear"), Gemma 3 and PerceptionLM ("avg"), which copy the tokens to channels first. Sums
    are fp32. The gradient of a maximum goes to the first of equal values, as in PyTorch. Dtypes
    other than fp32, fp16 and bf16 fall back.

    Args:
        x: A grid in row-major order. Rows at any pitch, as in ``hidden[:, 1:]``, are not copied.
        height: Rows of the grid.
        width: Columns of the grid.
        mode: "avg" or "max" of adjacent windows; rows and columns that fill no window are left out.
            "bilinear": resized to ``ceil(height / stride) x ceil(width / stride)`` from two by two
            neighbours (``align_corners=False``).
        stride: The side of a window, or the factor by which rows and columns become fewer.

    Returns:
        ``(..., pooled height * pooled width, features)``, of x's dtype.
    """
    image = x.unflatten(-2, (height, width)).flatten(0, -4).permute(0, 3, 1, 2)
    size = Pooling(height, width, mode, stride).pooled
    if mode == "avg":
        image = F.avg_pool2d(image, stride)
    elif mode == "max":
        image = F.max_pool2d(image, stride)
    else:
        image = F.interpolate(image, size=size, mode="bilinear")
    return image.permute(0, 2, 3, 1).reshape(*x.shape[:-2], math.prod(size), x.shape[-1])


@spatial_pool.forward
def forward(
    needs_grad: Any, x: Tensor, *, height: int, width: int, mode: str, stride: int
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    pooling = Pooling(height, width, mode, stride)
    down, across = pooling.pooled
    shape = (*x.shape[:-2], down * across, x.shape[-1])
    if x.numel() == 0:
        return x.new_empty(shape), (None,)
    x = dense(x)
    x = x if x.ndim == 3 else x.flatten(0, -3)
    pooled, chosen = kernels.spatial_pool(x, pooling, needs_grad.x and mode == "max")
    return pooled if x.ndim == len(shape) else pooled.view(shape), (
        chosen if needs_grad.x else None,
    )


@spatial_pool.backward
def backward(
    needs_grad: Any, saved_tensors: Any, dy: Tensor,
    *, height: int, width: int, mode: str, stride: int,
) -> tuple[Tensor]:  # fmt: skip
    leading, features = dy.shape[:-2], dy.shape[-1]
    shape = (*leading, height * width, features)
    if dy.numel() == 0:
        return (dy.new_empty(shape),)
    (chosen,) = saved_tensors
    dpooled = dy.contiguous()
    if dy.ndim != 3:
        dpooled = dpooled.view(math.prod(leading), dy.shape[-2], features)
    dx = kernels.spatial_pool_backward(dpooled, chosen, Pooling(height, width, mode, stride))
    return (dx if dy.ndim == 3 else dx.view(shape),)


@spatial_pool.cost
def cost(x: Tensor, *, height: int, width: int, mode: str, stride: int) -> Cost:
    pooled = math.prod(Pooling(height, width, mode, stride).pooled)
    written = nbytes(x) * pooled // (height * width)
    chosen = written // x.element_size() if mode == "max" else 0
    return Cost(
        forward_flops=x.numel(),
        forward_bytes=nbytes(x) + written,
        backward_flops=x.numel(),
        backward_bytes=nbytes(x) + written + chosen,
    )


@spatial_pool.inputs(
    smallest=dict(batch=1, height=1, width=1, features=1, stride=1),
    usual=dict(batch=3, height=5, width=7, features=17),
    others=[
        dict(batch=2, height=4, width=9, features=24, mode="max"),
        dict(batch=2, height=5, width=9, features=40, drop_first=1, mode="bilinear"),
        dict(batch=2, height=5, width=7, features=40, mode="bilinear", stride=3),
        dict(batch=1, height=1, width=3, features=7, mode="bilinear"),  # a tap outside the grid
    ],
    large=dict(batch=5, height=460, width=460, features=2048),
    bitwise=True,
    bench={
        "Gemma-3, 8 images": dict(batch=8, height=64, width=64, features=1152, stride=4),
        "LLaVA-OneVision, 32 frames": dict(
            batch=32, height=27, width=27, features=3584, mode="bilinear"
        ),
        "LLaVA-NeXT-Video, 32 frames": dict(
            batch=32, height=24, width=24, features=1024, drop_first=1
        ),
        "PerceptionLM, 37 tiles": dict(batch=37, height=32, width=32, features=4096),
    },
)
def inputs(
    batch: int, height: int, width: int, features: int, *, drop_first: int = 0
) -> tuple[Tensor]:
    return (torch.randn(batch, height * width + drop_first, features)[:, drop_first:],)
