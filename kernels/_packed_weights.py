"""Several linears that share an input, computed as one.

On a GPU the weights are concatenated for the duration of the call, because one large GEMM fills the
GPU and several small ones leave most of it idle. On a CPU, in fp32, each linear writes its own
columns and nothing is copied. Parameters and their gradients always have memory of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._launcher import dense, is_traced, runs_triton
from ._sum_shares import MOST_GRADIENTS, sum_shares

MOST_ROWS = 4096  # of a sum over rows by one program; ATen splits more rows among several


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """``cat([linear(x, weight, bias) for ...], -1)`` of ``x (rows, in)``."""
    if _as_one_gemm(x):
        weight, bias = _concatenated(weights, biases)
        return torch.addmm(bias, x, weight.t())
    sizes = [weight.shape[0] for weight in weights]
    y = x.new_empty(x.shape[0], sum(sizes))
    for part, weight, bias in zip(y.split(sizes, 1), weights, biases, strict=True):
        torch.addmm(bias, x, weight.t(), out=part)
    return y


def input_gradient(dy: Tensor, weights: Sequence[Tensor], residual: Tensor | None = None) -> Tensor:
    """The gradient of x ``(rows, in)``, from the gradient of the result ``(rows, sum of out)``.

    ``residual`` is added to it: the gradient of x by another path.
    """
    whole = len(weights) == 1
    if whole or _as_one_gemm(dy):
        weight = weights[0] if whole else torch.cat(list(weights))
        return torch.mm(dy, weight) if residual is None else torch.addmm(residual, dy, weight)
    first, *parts = dy.split([weight.shape[0] for weight in weights], 1)
    dx = input_gradient(first, weights[:1], residual)
    for part, weight in zip(parts, weights[1:], strict=True):
        dx.addmm_(part, weight)
    return dx


def parameter_gradients(
    dy: Tensor,
    x: Tensor,
    sizes: Sequence[int],
    wanted: Sequence[bool],
    zero: int | None = None,
    *,
    apart: bool = False,
) -> list[Tensor | None]:
    """The gradients of all weights, then of all biases; None for those that are not wanted.

    ``x`` is read for weights only. ``zero`` is the index of a bias whose gradient is zero but for
    rounding errors. ``apart`` asks for one product per weight: for few rows it takes the host less
    time than to split the gradient of all weights.
    """
    of_weights, of_biases = wanted[: len(sizes)], wanted[len(sizes) :]
    weights: list[Tensor | None] = [None] * len(sizes)
    if all(of_weights) and (len(sizes) == 1 or (_as_one_gemm(dy) and not apart)):
        whole = torch.mm(dy.t(), x)
        weights = [whole] if len(sizes) == 1 else [*split_copy(whole, sizes)]
    elif any(of_weights):
        parts = zip(dy.split(list(sizes), 1), of_weights, strict=True)
        weights = [torch.mm(part.t(), x) if want else None for part, want in parts]
    if not any(of_biases):
        return [*weights, *[None] * len(sizes)]
    return [*weights, *_bias_gradients(dy, sizes, zero)]


def _bias_gradients(dy: Tensor, sizes: Sequence[int], zero: int | None) -> list[Tensor]:
    if runs_triton(dy) and len(sizes) <= MOST_GRADIENTS and dy.shape[0] <= MOST_ROWS:
        biases = [dy.new_empty(size) for size in sizes]
        sum_shares(dense(dy), *biases, zero=zero)
        return biases
    total = dy.sum(0)
    biases = [total] if len(sizes) == 1 else split_copy(total, sizes)
    if zero is not None:
        biases[zero].mul_(0)  # NaN stays NaN
    return biases


def split_copy(whole: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Split a tensor along its rows into copies with memory of their own."""
    if is_traced(whole):  # split_with_sizes_copy has no out= variant for fake tensors
        return [part.clone() for part in whole.split(list(sizes))]
    parts = [whole.new_empty(size, *whole.shape[1:]) for size in sizes]
    torch.split_with_sizes_copy(whole, list(sizes), 0, out=parts)
    return parts


def _concatenated(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Concatenate the weights, and the biases, by one launch."""
    whole = torch.cat([*[weight.reshape(-1) for weight in weights], *biases])
    rows, width = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    weight, bias = whole.split([rows * width, rows])
    return weight.view(rows, width), bias


def _as_one_gemm(x: Tensor) -> bool:
    # One product in 16 bits on a CPU too: a sum of several would be rounded after each.
    return x.is_cuda or x.dtype != torch.float32
