"""RMS norm of the queries of media attention, outside of its kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ._launcher import runs_triton


def norms_inside(q: Tensor) -> bool:
    """Whether the kernels norm the queries. fp32 products leave no registers for it."""
    return runs_triton(q) and q.dtype != torch.float32


def normed(q: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMS norm in plain PyTorch, rounded before the weight; and 1 / rms in fp32."""
    wide = q.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return ((wide * inverse).to(q.dtype) * weight).to(q.dtype), inverse


def norm_backward(
    dnormed: Tensor, q: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Backward of `normed`: gradients of the queries and of the weight.

    The first is laid out in memory as ``(batch, queries, heads, d)``.
    """
    unit = q.float() * inverse
    dweight = (dnormed * unit.to(q.dtype)).sum((0, 1, 2), dtype=torch.float32).to(weight.dtype)
    dunit = dnormed * weight.float()
    dq = (dunit - unit * (dunit * unit).mean(-1, keepdim=True)) * inverse
    return dq.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), dweight
