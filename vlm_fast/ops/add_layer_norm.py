"""The end of a post-norm sub-layer: bias, dropout, residual and LayerNorm at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels import add_layer_norm as kernels
from vlm_fast.kernels._dropout import keep_mask
from vlm_fast.kernels._launcher import in_rows
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_type, wrong_value
from vlm_fast.ops.declaration import FLOATS, Cost, nbytes, op

MAX_FEATURES = 8192


@op
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
    """``layer_norm(dropout(x + x_bias) + residual, weight, bias)``.

    Mirrors transformers' ``Blip2QFormerSelfOutput`` after the product of its dense layer, whose
    bias is ``x_bias``. LayerNorm: arXiv 1607.06450.

    Args:
        x, residual: ``(..., features)``, of one shape; rows at any pitch, as in ``hidden[:, :32]``,
            and a batch stride of 0 are not copied. x may be fp16 or bf16 where the residual is
            fp32.
        weight, bias: ``(features,)``; both of the residual's dtype, or both fp32.
        x_bias: ``(features,)`` or None, of x's dtype or fp32.
        seed: one int64, for dropout of x (see `vlm_fast.kernels._dropout`).
        eps: added to the variance.
        dropout: probability in [0, 1).

    Statistics are fp32. Other floating dtypes, and more than 8192 features, fall back. Returns the
    shape and dtype of the residual.

    Raises:
        TypeError: an argument is no tensor, not floating, or of a dtype not named here.
        ValueError: shapes do not fit, devices differ, dropout without a seed or not in [0, 1).
    """
    if x_bias is not None:
        x = x + x_bias
    if dropout > 0:
        assert seed is not None, "dropout needs a seed"
        rows, features = math.prod(x.shape[:-1]), x.shape[-1]
        row, col = (torch.arange(n, device=x.device) for n in (rows, features))
        keep = keep_mask(seed, dropout, col, row[:, None], row.new_zeros(()))
        x = x * keep.view(x.shape) / (1 - dropout)
    z = (x + residual).to(residual.dtype)
    parameters = (weight.to(z.dtype), bias.to(z.dtype))
    return F.layer_norm(z, (z.shape[-1],), *parameters, eps)


add_layer_norm.plain_on_cpu = True


@add_layer_norm.accepts
def accepts(x, residual, weight, bias, x_bias, seed, *, eps, dropout):
    mistake = None
    try:
        dtype, device = residual.dtype, residual.device
        features = residual.shape[-1]
        usual = (
            x.shape == residual.shape
            and weight.shape == bias.shape == (features,)
            and x.dtype is dtype
            and weight.dtype is dtype
            and bias.dtype is dtype
            and x.device == weight.device == bias.device == device
            and dtype.is_floating_point
            and dropout == 0
            and (seed is None or _is_seed(seed, device))
            and (
                x_bias is None
                or (
                    x_bias.shape == (features,)
                    and x_bias.dtype is dtype
                    and x_bias.device == device
                )
            )
        )
    except (AttributeError, IndexError, TypeError):
        usual = False
    if not usual:
        mistake = _mistake(x, residual, weight, bias, x_bias, seed, dropout)
    if mistake is not None:
        raise mistake
    return x, residual, weight, bias, x_bias, seed


def _is_seed(seed, device):
    return seed.dtype is torch.int64 and seed.shape in ((), (1,)) and seed.device == device


def _mistake(x, residual, weight, bias, x_bias, seed, dropout):
    name = "add_layer_norm"
    optional = dict(x_bias=x_bias, seed=seed)
    named = dict(x=x, residual=residual, weight=weight, bias=bias, **optional)
    for argument, value in named.items():
        if not isinstance(value, Tensor) and not (value is None and argument in optional):
            return not_a_tensor(name, argument, value)
    if residual.ndim < 1:
        return wrong_value(name, "residual", residual, "(..., features)")
    if x.shape != residual.shape:
        return wrong_value(name, "x", x, f"{tuple(residual.shape)} as residual has")
    features = residual.shape[-1]
    for argument in ("weight", "bias", "x_bias"):
        value = named[argument]
        if value is not None and value.shape != (features,):
            return wrong_value(name, argument, value, f"({features},) to match residual")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        return wrong_value(name, "dropout", dropout, "a number in [0, 1)")
    if dropout > 0 and seed is None:
        return wrong_type(name, "seed", seed, "one int64, which dropout needs")
    if seed is not None and seed.dtype != torch.int64:
        return wrong_type(name, "seed", seed, "torch.int64")
    if seed is not None and seed.shape not in ((), (1,)):
        return wrong_value(name, "seed", seed, "one int64")
    if not residual.is_floating_point():
        return wrong_type(
            name, "residual", residual, "a floating dtype (float32, bfloat16, float16)"
        )
    if x.dtype != residual.dtype and not (
        residual.dtype is torch.float32 and x.is_floating_point() and x.element_size() == 2
    ):
        return wrong_type(name, "x", x, f"{residual.dtype} as residual has")
    for argument, like in (("weight", residual), ("x_bias", x)):
        value = named[argument]
        if value is not None and value.dtype not in (like.dtype, torch.float32):
            return wrong_type(name, argument, value, f"{like.dtype}, or torch.float32")
    if bias.dtype != weight.dtype:
        return wrong_type(name, "bias", bias, f"{weight.dtype} as weight has")
    for argument, value in named.items():
        if value is not None and value.device != residual.device:
            return wrong_value(name, argument, value, f"{residual.device}, where residual is")
    return None


@add_layer_norm.requires
def requires(x, residual, weight, bias, x_bias, seed, *, eps, dropout):
    if residual.dtype not in FLOATS or x.dtype not in FLOATS:
        return f"{residual.dtype} has no kernels here (float32, bfloat16 and float16 have)"
    if residual.shape[-1] > MAX_FEATURES:
        return f"{residual.shape[-1]} features are more than {MAX_FEATURES}, a row a program holds"
    return None


@add_layer_norm.forward
def forward(needs, x, residual, weight, bias, x_bias, seed, *, eps, dropout):
    seed = seed if dropout > 0 else None
    wanted = any(needs)
    if residual.numel() == 0:
        y, statistics = torch.empty_like(residual), tuple([residual] * 3)
    else:
        y, statistics = kernels.add_layer_norm(
            in_rows(x), in_rows(residual), weight.contiguous(), bias.contiguous(),
            None if x_bias is None else x_bias.contiguous(), seed,
            eps=eps, dropout=dropout, want_statistics=wanted,
        )  # fmt: skip
        y = y.view(residual.shape)
    if not wanted:
        return y, ()
    return y, (
        *statistics, weight, bias if needs.bias else None, seed,
        x.new_empty(0) if needs.x else None,  # for their dtypes alone
        x_bias.new_empty(0) if needs.x_bias else None,
    )  # fmt: skip


@add_layer_norm.backward
def backward(needs, kept, dy, *, eps, dropout):
    z, mean, rstd, weight, bias, seed, x_like, x_bias_like = kept
    features = dy.shape[-1]
    if dy.numel() == 0:
        zeros = weight.new_zeros(features)
        dx = None if x_like is None else dy.to(x_like.dtype)
        dx_bias = None if x_bias_like is None else zeros.to(x_bias_like.dtype)
        found = (dx, dy, zeros, zeros.clone(), dx_bias, None)
        return tuple(g if need else None for g, need in zip(found, needs, strict=True))
    dx, dresidual, dweight, dbias, dx_bias = kernels.add_layer_norm_backward(
        dy.contiguous().view(-1, features), (z, mean, rstd), weight.contiguous(), bias, seed,
        dropout=dropout, x_dtype=dy.dtype if x_like is None else x_like.dtype,
        want_x=needs.x, want_residual=needs.residual, want_weight=needs.weight,
        want_bias=needs.bias, want_x_bias=needs.x_bias,
    )  # fmt: skip
    shared = dx is dresidual
    dx = dx.view(dy.shape) if needs.x else None
    return (
        dx,
        (dx if shared else dresidual.view(dy.shape)) if needs.residual else None,
        dweight.to(weight.dtype) if needs.weight else None,
        dbias.to(bias.dtype) if needs.bias else None,
        dx_bias.to(x_bias_like.dtype) if needs.x_bias else None,
        None,
    )


@add_layer_norm.cost
def cost(x, residual, weight, bias, x_bias, seed, *, eps, dropout):
    parameters = nbytes(weight, bias, x_bias)
    rows = nbytes(residual)
    return Cost(
        forward_flops=8 * residual.numel(),
        forward_bytes=nbytes(x) + 2 * rows + parameters,
        backward_flops=14 * residual.numel(),
        backward_bytes=3 * rows + (nbytes(x) if dropout else 0) + 2 * parameters,
    )


@add_layer_norm.inputs(
    test=[
        dict(shape=(1, 1), eps=0.01),
        dict(shape=(3, 17), x_biased=True),
        dict(shape=(257, 100)),
        dict(shape=(3, 17, 24), drop_first=1, x_biased=True),
        dict(shape=(2, 5, 72), x_biased=True, dropout=0.25),
        dict(shape=(5, 1152)),
        dict(shape=(34, 40), eps=1e-5),
    ],
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
def inputs(shape, *, drop_first=0, x_biased=False):
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
