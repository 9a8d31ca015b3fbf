"""Several linear layers of one input computed as one GEMM."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels._packed_weights import input_gradient, linears, parameter_gradients
from vlm_fast.ops.argument_errors import wrong_value
from vlm_fast.ops.declaration import Cost, linear_op, nbytes


@linear_op(
    x="floating (..., in)",
    parameters="list of like x",
)
def stacked_linear(x: Tensor, parameters: list[Tensor]) -> Tensor:
    """Apply several linears to one input as one GEMM: ``cat([linear(x, w, b), ...], dim=-1)``.

    For example the keys and values of many layers. On a GPU the weights are concatenated in each
    pass; the concatenation is not kept. Every gradient has memory of its own. Dtypes other than
    fp32, fp16 and bf16 fall back.

    Args:
        parameters: n weights ``(out_i, in)``, then n biases ``(out_i,)``.

    Returns:
        ``(..., sum of out_i)``, in x's dtype or autocast's.
    """
    count = len(parameters) // 2
    pairs = zip(parameters[:count], parameters[count:], strict=True)
    return torch.cat([F.linear(x, weight, bias) for weight, bias in pairs], dim=-1)


@stacked_linear.check
def check(x: Tensor, parameters: list[Tensor]) -> ValueError | None:
    name, count = "stacked_linear", len(parameters) // 2
    if not count or len(parameters) % 2:
        return wrong_value(name, "the length of parameters", len(parameters), "2 n, n above 0")
    for i, value in enumerate(parameters):
        wanted = ("*", x.shape[-1]) if i < count else tuple(parameters[i - count].shape[:1])
        if value.ndim != len(wanted) or value.shape[-1] != wanted[-1]:
            return wrong_value(name, f"parameters[{i}]", value, f"{wanted} to match")
    return None


@stacked_linear.forward
def forward(
    needs_grad: Any, x: Tensor, parameters: list[Tensor]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    count = len(parameters) // 2
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = linears(rows, parameters[:count], parameters[count:])
    y = y.view(*x.shape[:-1], y.shape[-1])
    if not any(needs_grad):
        return y, ()
    return y, (
        x if needs_grad.parameters else None,
        *(weight if needs_grad.x else None for weight in parameters[:count]),
        *(bias if needs_grad.parameters else None for bias in parameters[count:]),
    )


@stacked_linear.backward
def backward(needs_grad: Any, saved_tensors: Any, dy: Tensor) -> tuple[Any, Any]:
    x, *parameters = saved_tensors
    count = len(parameters) // 2
    rows = dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1])
    dx = dparameters = None
    if needs_grad.x:
        dx = input_gradient(rows, parameters[:count])
        dx = dx.view(*dy.shape[:-1], dx.shape[-1])
    if needs_grad.parameters:
        sizes = [bias.shape[0] for bias in parameters[count:]]
        x = x.reshape(rows.shape[0], x.shape[-1])
        dparameters = parameter_gradients(rows, x, sizes, needs_grad.parameters)
    return dx, dparameters


@stacked_linear.cost
def cost(x: Tensor, parameters: list[Tensor]) -> Cost:
    count = len(parameters) // 2
    outs = sum(bias.shape[0] for bias in parameters[count:])
    rows = x.shape[:-1].numel()
    flops = 2 * rows * outs * x.shape[-1]
    moved = nbytes(x, *parameters) + rows * outs * x.element_size()
    return Cost(
        flops, moved, 2 * flops, 2 * nbytes(x, *parameters) + rows * outs * x.element_size()
    )


@stacked_linear.inputs(
    smallest=dict(shape=(1, 1), outs=(1,)),
    usual=dict(shape=(3, 17), outs=(5, 9)),
    others=[
        dict(shape=(2, 33, 24), outs=(16, 16, 8)),
    ],
    large=dict(shape=(5, 107_000, 64), outs=(2048, 2048)),
    bench={
        "BLIP-2 keys and values, 16 images": dict(shape=(16, 257, 1408), outs=(768,) * 12),
        "BLIP-2 keys and values, 1 image": dict(shape=(1, 257, 1408), outs=(768,) * 12),
    },
)
def inputs(shape: tuple[int, ...], outs: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    width = shape[-1]
    weights = [torch.randn(out, width) * width**-0.5 for out in outs]
    return torch.randn(shape), [*weights, *(torch.randn(out) * 0.1 for out in outs)]
