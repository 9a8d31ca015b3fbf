"""Several linears of one input as one GEMM."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels._packed_weights import input_gradient, linears, parameter_gradients
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_type, wrong_value
from vlm_fast.ops.declaration import FLOATS, Cost, linear_op, nbytes


@linear_op
def stacked_linear(x: Tensor, parameters: list[Tensor]) -> Tensor:
    """``cat([linear(x, weight, bias) for ...], dim=-1)``, as keys and values of many layers are.

    On a GPU the weights are put together for each pass, and not kept. Every gradient has memory of
    its own.

    Args:
        x: ``(..., in)``.
        parameters: n weights ``(out_i, in)``, then n biases ``(out_i,)``.

    All floating, of one dtype (fp32, fp16 or bf16; others fall back) and one device. Returns
    ``(..., sum of out_i)``.

    Raises:
        TypeError: an argument is no tensor, not floating, or of another dtype than x.
        ValueError: shapes do not fit, or devices differ.
    """
    count = len(parameters) // 2
    pairs = zip(parameters[:count], parameters[count:], strict=True)
    return torch.cat([F.linear(x, weight, bias) for weight, bias in pairs], dim=-1)


@stacked_linear.accepts
def accepts(x, parameters):
    mistake = _mistake(x, parameters)
    if mistake is not None:
        raise mistake
    return x, list(parameters)


def _mistake(x, parameters):
    name = "stacked_linear"
    if not isinstance(x, Tensor):
        return not_a_tensor(name, "x", x)
    if not isinstance(parameters, (list, tuple)):
        return not_a_tensor(name, "parameters", parameters)
    count = len(parameters) // 2
    if not count or len(parameters) % 2:
        return wrong_value(name, "parameters", len(parameters), "as many weights as biases")
    if x.ndim < 1:
        return wrong_value(name, "x", x, "(..., in), at least one dimension")
    if not x.is_floating_point():
        return wrong_type(name, "x", x, "a floating dtype (float32, bfloat16 or float16)")
    for i, value in enumerate(parameters):
        if not isinstance(value, Tensor):
            return not_a_tensor(name, f"parameters[{i}]", value)
    for i, value in enumerate(parameters):
        argument = f"parameters[{i}]"
        if i < count and (value.ndim != 2 or value.shape[1] != x.shape[-1]):
            return wrong_value(name, argument, value, f"(*, {x.shape[-1]}) to match x")
        if i >= count and value.shape != parameters[i - count].shape[:1]:
            return wrong_value(
                name, argument, value, f"{tuple(parameters[i - count].shape[:1])}, a bias"
            )
        if value.dtype != x.dtype:
            return wrong_type(name, argument, value, f"{x.dtype} as x has")
        if value.device != x.device:
            return wrong_value(name, argument, value, f"{x.device}, where x is")
    return None


@stacked_linear.requires
def requires(x, parameters):
    if x.dtype not in FLOATS:
        return f"{x.dtype} has no kernels here (float32, bfloat16 and float16 have)"
    return None


@stacked_linear.forward
def forward(needs, x, parameters):
    count = len(parameters) // 2
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = linears(rows, parameters[:count], parameters[count:])
    y = y.view(*x.shape[:-1], y.shape[-1])
    if not any(needs):
        return y, ()
    return y, (
        x if needs.parameters else None,
        *(weight if needs.x else None for weight in parameters[:count]),
        *(bias if needs.parameters else None for bias in parameters[count:]),
    )


@stacked_linear.backward
def backward(needs, kept, dy):
    x, *parameters = kept
    count = len(parameters) // 2
    rows = dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1])
    dx = dparameters = None
    if needs.x:
        dx = input_gradient(rows, parameters[:count])
        dx = dx.view(*dy.shape[:-1], dx.shape[-1])
    if needs.parameters:
        sizes = [bias.shape[0] for bias in parameters[count:]]
        x = x.reshape(rows.shape[0], x.shape[-1])
        dparameters = parameter_gradients(rows, x, sizes, needs.parameters)
    return dx, dparameters


@stacked_linear.cost
def cost(x, parameters):
    count = len(parameters) // 2
    outs = sum(bias.shape[0] for bias in parameters[count:])
    rows = x.shape[:-1].numel()
    flops = 2 * rows * outs * x.shape[-1]
    moved = nbytes(x, *parameters) + rows * outs * x.element_size()
    return Cost(
        flops, moved, 2 * flops, 2 * nbytes(x, *parameters) + rows * outs * x.element_size()
    )


@stacked_linear.inputs(
    test=[
        dict(shape=(1, 1), outs=(1,)),
        dict(shape=(3, 17), outs=(5, 9)),
        dict(shape=(2, 33, 24), outs=(16, 16, 8)),
    ],
    bench={
        "BLIP-2 keys and values, 16 images": dict(shape=(16, 257, 1408), outs=(768,) * 12),
        "BLIP-2 keys and values, 1 image": dict(shape=(1, 257, 1408), outs=(768,) * 12),
    },
)
def inputs(shape, outs):
    width = shape[-1]
    weights = [torch.randn(out, width) * width**-0.5 for out in outs]
    return torch.randn(shape), [*weights, *(torch.randn(out) * 0.1 for out in outs)]
