"""Activation, linear: what follows the first two linears of a deeper projector."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels._activation import ACTIVATIONS
from vlm_fast.kernels.mlp import activate, mlp_activation_backward
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_type, wrong_value
from vlm_fast.ops.declaration import FLOATS, Cost, linear_op, nbytes


@linear_op
def act_linear(
    z: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str = "gelu"
) -> Tensor:
    """``linear(act(z), weight, bias)``, of which backward keeps z alone.

    Eager keeps z and its activation. Of linear, act, linear, act, linear eager keeps five tensors;
    `mlp` and this one keep three.

    Args:
        z: ``(..., in)``; any strides.
        weight, bias: ``(out, in)`` and ``(out,)`` or None.
        activation: "gelu" (exact), "gelu_tanh", "quick_gelu", "silu" or "relu".

    All floating, of one dtype (fp32, fp16 or bf16; others fall back) and one device. Returns
    ``(..., out)`` in that dtype, or autocast's.

    Raises:
        TypeError: an argument is not a tensor, not floating, or of another dtype than z.
        ValueError: shapes do not fit, devices differ, or ``activation`` is unknown.
    """
    return F.linear(activate(z, activation), weight, bias)


@act_linear.accepts
def accepts(z, weight, bias, *, activation):
    mistake = _mistake(z, weight, bias, activation)
    if mistake is not None:
        raise mistake
    return z, weight, bias


def _mistake(z, weight, bias, activation):
    name = "act_linear"
    given = dict(z=z, weight=weight) if bias is None else dict(z=z, weight=weight, bias=bias)
    for argument, value in given.items():
        if not isinstance(value, Tensor):
            return not_a_tensor(name, argument, value)
    if activation not in ACTIVATIONS:
        return wrong_value(name, "activation", activation, f"one of {ACTIVATIONS}")
    if z.ndim < 1:
        return wrong_value(name, "z", z, "(..., in), at least one dimension")
    if weight.ndim != 2 or weight.shape[1] != z.shape[-1]:
        wanted = f"(*, {z.shape[-1]}) to match z[..., {z.shape[-1]}]"
        return wrong_value(name, "weight", weight, wanted)
    if bias is not None and bias.shape != weight.shape[:1]:
        return wrong_value(name, "bias", bias, f"({weight.shape[0]},) or None")
    if not z.is_floating_point():
        return wrong_type(name, "z", z, "a floating dtype (float32, bfloat16 or float16)")
    for argument, value in given.items():
        if value.dtype != z.dtype:
            return wrong_type(name, argument, value, f"{z.dtype} as z has")
        if value.device != z.device:
            return wrong_value(name, argument, value, f"{z.device}, where z is")
    return None


@act_linear.requires
def requires(z, weight, bias, *, activation):
    if z.dtype not in FLOATS:
        return f"{z.dtype} has no kernels here (float32, bfloat16 and float16 have)"
    if z.layout is not torch.strided or z.is_nested:
        return f"z is not a dense tensor (layout {z.layout})"
    return None


@act_linear.forward
def forward(needs, z, weight, bias, *, activation):
    y = F.linear(activate(z, activation), weight, bias)
    return y, (z if needs.z or needs.weight else None, weight if needs.z else None)


@act_linear.backward
def backward(needs, kept, dy, *, activation):
    z, weight = kept
    leading, dy = dy.shape[:-1], _rows(dy)
    dz = h = dweight = None
    if needs.z:
        rows = dy.shape[0]
        dz, h, _ = mlp_activation_backward(
            _rows(z).contiguous(), torch.mm(dy, weight), rows, rows, activation,
            want_h=needs.weight, want_dbias=False,
        )  # fmt: skip
        dz = dz.view(*leading, dz.shape[1])
    elif needs.weight:
        h = _rows(activate(z, activation))
    if h is not None:
        dweight = torch.mm(dy.t(), h)
    return dz, dweight, dy.sum(0) if needs.bias else None


def _rows(x: Tensor) -> Tensor:
    # Not -1: of no elements it could be any number.
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@act_linear.cost
def cost(z, weight, bias, *, activation):
    rows = z.shape[:-1].numel()
    flops, y = 2 * rows * weight.numel(), rows * weight.shape[0] * z.element_size()
    moved = nbytes(z, weight, bias)
    return Cost(flops, moved + y, 2 * flops, 2 * moved + y)


@act_linear.inputs(
    test=[
        dict(shape=(1, 1), out=1),
        dict(shape=(3, 17), out=5, activation="silu"),
        dict(shape=(257, 100), out=24),
        dict(shape=(2, 65, 72), out=33, activation="gelu_tanh"),
        dict(shape=(3, 17, 136), drop_first=1, out=16),
        dict(shape=(5, 300), out=24, activation="quick_gelu"),
        dict(shape=(140, 48), out=8, activation="relu", bias=False),
    ],
    bench={
        "LLaVA mlp3x, 1 image": dict(shape=(1, 576, 4096), out=4096),
        "LLaVA mlp3x, 8 images": dict(shape=(8, 576, 4096), out=4096),
    },
)
def inputs(shape, out, *, drop_first=0, bias=True):
    z = torch.randn(shape)[..., drop_first:, :] if drop_first else torch.randn(shape)
    inner = shape[-1]
    return (
        z,
        torch.randn(out, inner) * inner**-0.5,
        torch.randn(out) * 0.1 if bias else None,
    )
