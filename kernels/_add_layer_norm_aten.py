"""`add_layer_norm` from ATen's kernels, for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dropout import keep_mask


def forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None,
    seed: Tensor | None, eps: float, dropout: float,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Return y, like the residual, and z ``(rows, cols)`` with its mean and rstd ``(rows,)``."""
    z = x if x_bias is None else x + x_bias
    if seed is not None:
        z = z * _factor(z.view(-1, z.shape[-1]), seed, dropout).view(*z.shape)
    z = (z + residual).to(residual.dtype).view(-1, residual.shape[-1])
    y, mean, rstd = torch.native_layer_norm(
        z, (z.shape[1],), weight.to(z.dtype), bias.to(z.dtype), eps
    )
    return y.view(*residual.shape), (z, mean, rstd)


def backward(
    dy: Tensor, statistics: tuple[Tensor, ...], weight: Tensor, seed: Tensor | None,
    dropout: float, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients ``(rows, cols)`` of x and residual, and those of weight and bias."""
    z, mean, rstd = statistics
    like = weight.to(z.dtype)
    dz, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy, z, (z.shape[1],), mean, rstd, like, like, [True, want_weight, want_bias]
    )
    dx = dz if seed is None else dz * _factor(dz, seed, dropout)
    return dx, dz, dweight if want_weight else None, dbias if want_bias else None


def _factor(rows: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """Dropout's factor ``(rows, cols)``: 0, or 1 / (1 - dropout)."""
    row, col = (torch.arange(n, device=rows.device) for n in rows.shape)
    keep = keep_mask(seed, dropout, col, row[:, None], row.new_zeros(()))
    return keep.to(rows.dtype) / (1 - dropout)
