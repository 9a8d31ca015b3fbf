"""Bias, dropout, residual and LayerNorm in one pass, as at the end of a post-norm layer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels import add_layer_norm as kernels
from vlm_fast.kernels._dropout import keep_mask
from vlm_fast.kernels._launcher import in_rows
from vlm_fast.ops.declaration import Cost, nbytes, no_kernel_for, op

MAX_FEATURES = 8192


@op(
    x="like residual or half (*rows, features)",
    residual="floating (*rows, features)",
    weight="like residual or float32 (features)",
    bias="like weight (features)",
    x_bias="like x or float32 (features) or None",
    seed="int64 one element or None",
    dropout="number in [0, 1), needs seed",
    where={
        "x.dtype is residual.dtype or residual.dtype is float32": (
            "x: {residual.dtype} as residual has"
        ),
    },
)
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    eps: float = 1e-12,
    dropout: float = 0.0,
) -> Tensor:
    """Add a bias and a residual and apply LayerNorm, in one pass, with dropout.

    Computes ``layer_norm(dropout(x + x_bias) + residual, weight, bias)``. Mirrors transformers'
    ``Blip2QFormerSelfOutput`` after its dense layer, whose bias is ``x_bias``. LayerNorm is arXiv
    1607.06450; its statistics are fp32. Dtypes other than fp32, fp16 and bf16, and more than 8192
    features, fall back.

    Args:
        x: A half dtype is accepted if the residual is fp32. Rows at any pitch, as in
            ``hidden[:, :32]``, and a batch stride of 0 are read without a copy.
        seed: For dropout of x (see `vlm_fast.kernels._dropout`).
        eps: Added to the variance.
        dropout: The probability that an element of x is zeroed.

    Returns:
        The shape and dtype of the residual.
    """
    if x_bias is not None:
        x = x + x_bias
    if dropout > 0:
        assert seed is not None, "dropout needs a seed"
        rows, features = math.prod(x.shape[:-1]), x.shape[-1]
        row, col = (torch.arange(n, device=x.device) for n in (rows, features))
        keep = keep_mask(seed, dropout, col, row[:, None], row.new_zeros(()))
        x = x * keep.view(*x.shape) / (1 - dropout)
    z = (x + residual).to(residual.dtype)
    parameters = (weight.to(z.dtype), bias.to(z.dtype))
    return F.layer_norm(z, (z.shape[-1],), *parameters, eps)


add_layer_norm.plain_on_cpu = True


@add_layer_norm.fallback_reason
def fallback_reason(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor,
    x_bias: Tensor | None, seed: Tensor | None, *, eps: float, dropout: float,
) -> str | None:  # fmt: skip
    if residual.shape[-1] > MAX_FEATURES:
        return f"{residual.shape[-1]} features are more than {MAX_FEATURES}, the most per program"
    return no_kernel_for(residual)


@add_layer_norm.forward
def forward(needs_grad, x, residual, weight, bias, x_bias, seed, *, eps, dropout):
    seed = seed if dropout > 0 else None
    any_needed = any(needs_grad)
    if residual.numel() == 0:
        y, statistics = torch.empty_like(residual), tuple([residual] * 3)
    else:
        y, statistics = kernels.add_layer_norm(
            in_rows(x), in_rows(residual), weight.contiguous(), bias.contiguous(),
            None if x_bias is None else x_bias.contiguous(), seed,
            eps=eps, dropout=dropout, want_statistics=any_needed,
        )  # fmt: skip
        y = y.view(*residual.shape)
    if not any_needed:
        return y, ()
    return y, (
        *statistics, weight, seed,
        x.new_empty(0) if needs_grad.x else None,  # only for their dtypes
        x_bias.new_empty(0) if needs_grad.x_bias else None,
    )  # fmt: skip


@add_layer_norm.backward
def backward(
    needs_grad: Any, saved_tensors: Any, dy: Tensor, *, eps: float, dropout: float
) -> tuple[Tensor | None, ...]:
    z, mean, rstd, weight, seed, x_like, x_bias_like = saved_tensors
    features = dy.shape[-1]
    if dy.numel() == 0:
        zeros = weight.new_zeros(features)
        dx = None if x_like is None else dy.to(x_like.dtype)
        dx_bias = None if x_bias_like is None else zeros.to(x_bias_like.dtype)
        gradients = (dx, dy, zeros, zeros.clone(), dx_bias, None)
        return tuple(g if need else None for g, need in zip(gradients, needs_grad, strict=True))
    dx, dresidual, dweight, dbias, dx_bias = kernels.add_layer_norm_backward(
        dy.contiguous().view(-1, features), (z, mean, rstd), weight.contiguous(), seed,
        dropout=dropout, x_dtype=dy.dtype if x_like is None else x_like.dtype,
        x_bias_dtype=None if x_bias_like is None else x_bias_like.dtype,
        want_x=needs_grad.x, want_residual=needs_grad.residual, want_weight=needs_grad.weight,
        want_bias=needs_grad.bias,
    )  # fmt: skip
    shared = dx is dresidual
    dx = dx.view(*dy.shape) if needs_grad.x else None
    return (
        dx,
        (dx if shared else dresidual.view(*dy.shape)) if needs_grad.residual else None,
        dweight, dbias, dx_bias, None,
    )  # fmt: skip


@add_layer_norm.cost
def cost(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor,
    x_bias: Tensor | None, seed: Tensor | None, *, eps: float, dropout: float,
) -> Cost:  # fmt: skip
    parameters = nbytes(weight, bias, x_bias)
    rows = nbytes(residual)
    return Cost(
        forward_flops=8 * residual.numel(),
        forward_bytes=nbytes(x) + 2 * rows + parameters,
        backward_flops=14 * residual.numel(),
        backward_bytes=3 * rows + (nbytes(x) if dropout else 0) + 2 * parameters,
    )


@add_layer_norm.inputs(
    smallest=dict(shape=(1, 1), eps=0.01),
    usual=dict(shape=(3, 17), x_biased=True),
    others=[
        dict(shape=(257, 100)),
        dict(shape=(3, 17, 24), drop_first=1, x_biased=True),
        dict(shape=(2, 5, 72), x_biased=True, dropout=0.25),
        dict(shape=(5, 1152)),
        dict(shape=(34, 40), eps=0.5),
    ],
    large=dict(shape=(5, 107_000, 4096)),
    bitwise=True,
    bench={
        "BLIP-2 Q-Former, 64 images": dict(shape=(64, 32, 768), x_biased=True),
        "BLIP-2 Q-Former, 64 images, dropout": dict(
            shape=(64, 32, 768), x_biased=True, dropout=0.1
        ),
        "BLIP-2 Q-Former, 1 image": dict(shape=(1, 32, 768), x_biased=True),
        "ViT-L, 64 images": dict(shape=(64, 577, 1024)),
        "SigLIP, 32 images": dict(shape=(32, 729, 1152)),
        "ViT-g, 16 images": dict(shape=(16, 257, 1408)),
        "language model, 16384 tokens": dict(shape=(16384, 4096)),
    },
)
def inputs(
    shape: tuple[int, ...], *, drop_first: int = 0, x_biased: bool = False
) -> tuple[Tensor | None, ...]:
    x, residual = torch.randn(shape), torch.randn(shape)
    if drop_first:
        x, residual = x[..., drop_first:, :], residual[..., :-drop_first, :]
    features = shape[-1]
    return (
        x,
        residual,
        1 + torch.randn(features) * 0.1,
        torch.randn(features) * 0.1,
        torch.randn(features) * 0.1 if x_biased else None,
        torch.tensor([20260103]),
    )
