"""`spatial_pool` on a CPU, from ATen's pooling kernels.

Tokens by channels are ATen's channels-last layout, so images are views and not copies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launcher import is_traced
from ._pooling import Pooling


def _image(tokens: Tensor, height: int, width: int) -> Tensor:
    """A view ``(batch, cols, height, width)``; tokens by channels are ATen's channels-last."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _tokens(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def _windows(x: Tensor, pooling: Pooling) -> Tensor:
    """``(batch, pooled height, stride, pooled width, stride, cols)``, a view."""
    (height, width), stride = pooling.pooled, pooling.stride
    grid = x.unflatten(1, (pooling.height, pooling.width))
    grid = grid[:, : height * stride, : width * stride]
    return grid.unflatten(2, (width, stride)).unflatten(1, (height, stride))


def forward(x: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor | None]:
    image, side = _image(x, pooling.height, pooling.width), [pooling.stride] * 2
    if (
        pooling.mode == "avg" and x.dtype == torch.float32
    ):  # ATen's avg_pool2d takes ten times as long
        windows = _windows(x, pooling)
        taps = [windows[:, :, i, :, j] for i in range(side[0]) for j in range(side[1])]
        total = taps[0] + taps[1] if len(taps) > 1 else taps[0].clone()
        for tap in taps[2:]:
            total += tap
        return total.div_(len(taps)).flatten(1, 2), None
    if pooling.mode == "avg":
        return _tokens(torch.ops.aten.avg_pool2d(image, side, side)), None
    if pooling.mode == "max":
        pooled, chosen = torch.ops.aten.max_pool2d_with_indices(image, side, side)
        return _tokens(pooled), _tokens(chosen)
    found = torch.ops.aten.upsample_bilinear2d.default(image, list(pooling.pooled), False)
    return _tokens(found), None


def backward(dpooled: Tensor, chosen: Tensor | None, pooling: Pooling) -> Tensor:
    batch, _, cols = dpooled.shape
    height, width = pooling.height, pooling.width
    x = dpooled.new_empty(batch, height * width, cols)
    if is_traced(x):  # ATen's bilinear backward rejects symbolic sizes
        return x
    if pooling.mode == "avg":
        windows = _windows(x, pooling)
        if windows.numel() < x.numel():
            x.zero_()  # the last rows and columns may fill no window
        share = (dpooled / pooling.stride**2).unflatten(1, pooling.pooled)
        windows.copy_(share[:, :, None, :, None].expand_as(windows))
        return x
    grad, side = _image(dpooled, *pooling.pooled), [pooling.stride] * 2
    x = _image(x, height, width)  # ATen reads its sizes and strides only
    if chosen is not None:
        found = torch.ops.aten.max_pool2d_with_indices_backward(
            grad, x, side, side, [0, 0], [1, 1], False, _image(chosen, *pooling.pooled)
        )
    else:
        found = torch.ops.aten.upsample_bilinear2d_backward.default(
            grad, list(pooling.pooled), [batch, cols, height, width], False
        )
    return _tokens(found)
