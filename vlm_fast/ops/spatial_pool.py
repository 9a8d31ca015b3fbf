"""Fewer tokens of an image: its grid pooled, in the order in which towers leave it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels import spatial_pool as kernels
from vlm_fast.kernels._launcher import dense
from vlm_fast.kernels.spatial_pool import Pooling
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_type, wrong_value
from vlm_fast.ops.declaration import FLOATS, Cost, nbytes, op

NAME = "spatial_pool"
MODES = ("avg", "max", "bilinear")
MAX_STRIDE = 8


@op
def spatial_pool(
    x: Tensor, *, height: int, width: int, mode: str = "avg", stride: int = 2
) -> Tensor:
    """A grid of tokens, each ``stride x stride`` of them become one.

    Mirrors the pooling of transformers' LLaVA-NeXT-Video ("avg", "max"), LLaVA-OneVision
    ("bilinear"), Gemma 3 and PerceptionLM ("avg"), which go through a copy with channels first.

    Args:
        x: ``(..., height * width, features)``, a grid in row-major order, floating; rows at any
            pitch, as in ``hidden[:, 1:]``, are not copied.
        height, width: the grid.
        mode: "avg" or "max" of windows side by side, rows and columns that fill none left out;
            "bilinear": resized to ``ceil(height / stride) x ceil(width / stride)`` from two by two
            neighbours, pixels being areas (``align_corners=False``).
        stride: the side of a window, or how many times fewer rows and columns; at most 8.

    Dtypes other than fp32, fp16 and bf16 fall back; sums are fp32. Returns ``(..., pooled height *
    pooled width, features)``, of x's dtype. The gradient of a maximum goes to the first of equals,
    as in PyTorch.

    Raises:
        TypeError: x is no tensor, or not floating.
        ValueError: x is no such grid, none is left of it, or an option is unknown.
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


@spatial_pool.accepts
def accepts(x, *, height, width, mode, stride):
    mistake = _mistake(x, height, width, mode, stride)
    if mistake is not None:
        raise mistake
    return (x,)


def _mistake(x, height, width, mode, stride):
    if not isinstance(x, Tensor):
        return not_a_tensor(NAME, "x", x)
    if not x.is_floating_point():
        return wrong_type(NAME, "x", x, "a floating dtype (float32, bfloat16 or float16)")
    if mode not in MODES:
        return wrong_value(NAME, "mode", mode, f"one of {MODES}")
    if stride < 1 or stride > MAX_STRIDE:
        return wrong_value(NAME, "stride", stride, f"1 to {MAX_STRIDE}")
    least = 1 if mode == "bilinear" else stride
    for argument, value in (("height", height), ("width", width)):
        if value < least:
            return wrong_value(NAME, argument, value, f"{least} or more, at a stride of {stride}")
    if x.ndim < 3 or x.shape[-2] != height * width:
        wanted = f"(..., {height * width}, features), grids of {height} x {width} tokens"
        return wrong_value(NAME, "x", x, wanted)
    return None


@spatial_pool.requires
def requires(x, **options):
    if x.dtype not in FLOATS:
        return f"{x.dtype} has no kernels here (float32, bfloat16 and float16 have)"
    return None


@spatial_pool.forward
def forward(needs, x, *, height, width, mode, stride):
    pooling = Pooling(height, width, mode, stride)
    shape = (*x.shape[:-2], math.prod(pooling.pooled), x.shape[-1])
    if x.numel() == 0:
        return x.new_empty(shape), (None,)
    x = dense(x)
    x = x if x.ndim == 3 else x.flatten(0, -3)
    pooled, chosen = kernels.spatial_pool(x, pooling, needs.x and mode == "max")
    return pooled.view(shape), (chosen if needs.x else None,)


@spatial_pool.backward
def backward(needs, kept, dy, *, height, width, mode, stride):
    leading, features = dy.shape[:-2], dy.shape[-1]
    shape = (*leading, height * width, features)
    if dy.numel() == 0:
        return (dy.new_empty(shape),)
    (chosen,) = kept
    dpooled = dy.contiguous().view(math.prod(leading), dy.shape[-2], features)
    pooling = Pooling(height, width, mode, stride)
    return (kernels.spatial_pool_backward(dpooled, chosen, pooling).view(shape),)


@spatial_pool.cost
def cost(x, *, height, width, mode, stride):
    pooled = math.prod(Pooling(height, width, mode, stride).pooled)
    to = nbytes(x) * pooled // (height * width)
    chosen = to // x.element_size() if mode == "max" else 0
    return Cost(
        forward_flops=x.numel(),
        forward_bytes=nbytes(x) + to,
        backward_flops=x.numel(),
        backward_bytes=nbytes(x) + to + chosen,
    )


@spatial_pool.inputs(
    test=[
        dict(batch=1, height=1, width=1, features=1, stride=1),
        dict(batch=3, height=5, width=7, features=17),
        dict(batch=2, height=4, width=9, features=24, mode="max"),
        dict(batch=2, height=5, width=9, features=40, drop_first=1, mode="bilinear"),
        dict(batch=2, height=5, width=7, features=40, mode="bilinear", stride=3),
    ],
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
def inputs(batch, height, width, features, *, drop_first=0):
    return (torch.randn(batch, height * width + drop_first, features)[:, drop_first:],)
