"""Several linears of one input as one.

On a GPU the weights are put together for the call: one large GEMM fills it, several small ones
leave most of it idle. Elsewhere each linear writes its own columns, and nothing is copied. What was
put together is not kept: parameters and their gradients have memory of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """``cat([linear(x, weight, bias) for ...], -1)`` of ``x (rows, in)``."""
    if _at_once(x):
        return torch.addmm(torch.cat(list(biases)), x, torch.cat(list(weights)).t())
    sizes = [weight.shape[0] for weight in weights]
    y = x.new_empty(x.shape[0], sum(sizes))
    for part, weight, bias in zip(y.split(sizes, 1), weights, biases, strict=True):
        torch.addmm(bias, x, weight.t(), out=part)
    return y


def input_gradient(dy: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The gradient of x, from that of the result ``(rows, sum of out)``."""
    if _at_once(dy):
        return torch.mm(dy, torch.cat(list(weights)))
    parts = dy.split([weight.shape[0] for weight in weights], 1)
    dx = torch.mm(parts[0], weights[0])
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        dx.addmm_(part, weight)
    return dx


def weight_gradients(dy: Tensor, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The gradient of each weight."""
    if _at_once(x):
        return apart(torch.mm(dy.t(), x), sizes)
    return [torch.mm(part.t(), x) for part in dy.split(list(sizes), 1)]


def apart(whole: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The rows of a tensor as tensors that have memory of their own."""
    parts = [whole.new_empty(size, *whole.shape[1:]) for size in sizes]
    torch.split_with_sizes_copy(whole, list(sizes), 0, out=parts)
    return parts


def _at_once(x: Tensor) -> bool:
    # On a CPU the sum over several products would be rounded after each in 16 bits.
    return x.is_cuda or x.dtype != torch.float32
