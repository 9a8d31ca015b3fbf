"""`gated_add` on a CPU, from ATen's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Statistics = tuple[Tensor | None, Tensor | None]  # mean and 1 / standard deviation, (rows,)


def _gate_gradient(dtanh: Tensor, gate: Tensor) -> Tensor:
    """The gate's gradient, from the gradient ``(rows, cols)`` of its tanh in each row.

    The sum is taken in float64, because the gradient of a single gate sums over all rows and
    features, and these may nearly cancel.
    """
    axes = (0, 1) if gate.numel() == 1 else (0,)
    dtanh = dtanh.sum(axes, dtype=torch.float64).view(*gate.shape)
    dgate = dtanh / gate.double().cosh().square()  # 1 / cosh^2 = 1 - tanh^2 without cancellation
    return dgate.to(gate.dtype)


def forward(
    x: Tensor, y: Tensor, gate: Tensor, row_mask: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, eps: float, norm: str,
) -> tuple[Tensor, Tensor | None, Statistics]:  # fmt: skip
    h = y.float() * gate.float().tanh().view(-1)
    if row_mask is not None:
        h.masked_fill_(~row_mask.unsqueeze(-1), 0)
    h = h.add_(x).to(x.dtype).contiguous()
    if norm == "none" or weight is None:
        return h, None, (None, None)
    if norm == "layer":
        normed, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], weight, bias, eps)
        return h, normed, (mean, rstd)
    wide = h.float()
    rstd = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    normed = (wide * rstd).to(h.dtype) * weight
    return h, normed.to(h.dtype), (None, rstd)


def backward(
    dh: Tensor, dnormed: Tensor | None, h: Tensor | None, statistics: Statistics,
    y: Tensor | None, gate: Tensor, row_mask: Tensor | None, weight: Tensor | None, norm: str,
    want_x: bool, want_y: bool, want_gate: bool, want_weight: bool, want_bias: bool,
) -> tuple[Any, ...]:  # fmt: skip
    dweight = dbias = dgate = dy = None
    total = dh
    if norm != "none":
        assert dnormed is not None and h is not None and weight is not None
        found, dweight, dbias = _norm_backward(
            dnormed, h, statistics, weight, want_weight, want_bias
        )
        total = found.add_(dh)
    wide = total.float()
    kept = None if row_mask is None else ~row_mask.unsqueeze(-1)
    if want_gate and y is not None:
        product = wide * y
        if kept is not None:
            product.masked_fill_(kept, 0)
        dgate = _gate_gradient(product.reshape(-1, product.shape[-1]), gate)
    if want_y:
        dy = wide * gate.float().tanh().view(-1)
        dy = (dy if kept is None else dy.masked_fill_(kept, 0)).to(dh.dtype)
    if weight is not None:
        dweight, dbias = (g if g is None else g.to(weight.dtype) for g in (dweight, dbias))
    return total.to(dh.dtype) if want_x else None, dy, dgate, dweight, dbias


def _norm_backward(
    dnormed: Tensor, h: Tensor, statistics: Statistics, weight: Tensor,
    want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of h, in fp32, and of weight and bias."""
    mean, rstd = statistics
    if mean is not None:
        wants = [True, want_weight, want_bias]
        found = torch.ops.aten.native_layer_norm_backward(
            dnormed, h, h.shape[-1:], mean, rstd, weight, weight, wants
        )
        return found[0].float(), found[1], found[2]
    assert rstd is not None
    unit = h.float() * rstd
    dunit = dnormed.float() * weight
    dh = dunit - unit * (dunit * unit).mean(-1, keepdim=True)
    dweight = (dnormed * unit).view(-1, h.shape[-1]).sum(0) if want_weight else None
    return dh.mul_(rstd), dweight, None
