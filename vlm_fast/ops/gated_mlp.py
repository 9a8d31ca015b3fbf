"""The gated MLP of language models and of resamplers since Llama: SwiGLU and its kin."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels._activation import ACTIVATIONS
from vlm_fast.kernels.gated_mlp import gated_activation, gated_activation_backward
from vlm_fast.kernels.mlp import activate
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_type, wrong_value
from vlm_fast.ops.declaration import FLOATS, Cost, linear_op, nbytes


@linear_op
def gated_mlp(
    x: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    weight_down: Tensor,
    *,
    activation: str = "silu",
) -> Tensor:
    """``linear(act(linear(x, weight_gate)) * linear(x, weight_up), weight_down)``.

    GLU variants, arXiv 2002.05202. Mirrors transformers' ``MllamaTextMLP``, ``Idefics2MLP`` and the
    ``IdeficsMLP`` of the decoder. Backward keeps x and both products, not what is between.

    Args:
        x: ``(..., in)``.
        weight_gate, weight_up: ``(hidden, in)``.
        weight_down: ``(out, hidden)``.
        activation: "gelu", "gelu_tanh", "quick_gelu", "silu" or "relu".

    All floating, of one dtype (fp32, fp16 or bf16; others fall back) and one device. Returns
    ``(..., out)``.

    Raises:
        TypeError: an argument is no tensor, not floating, or of another dtype than x.
        ValueError: shapes do not fit, devices differ, or ``activation`` is unknown.
    """
    h = activate(F.linear(x, weight_gate), activation) * F.linear(x, weight_up)
    return F.linear(h, weight_down)


@gated_mlp.accepts
def accepts(x, weight_gate, weight_up, weight_down, *, activation):
    mistake = _mistake(x, weight_gate, weight_up, weight_down, activation)
    if mistake is not None:
        raise mistake
    return x, weight_gate, weight_up, weight_down


def _mistake(x, weight_gate, weight_up, weight_down, activation):
    name = "gated_mlp"
    weights = dict(weight_gate=weight_gate, weight_up=weight_up, weight_down=weight_down)
    for argument, value in dict(x=x, **weights).items():
        if not isinstance(value, Tensor):
            return not_a_tensor(name, argument, value)
    if activation not in ACTIVATIONS:
        return wrong_value(name, "activation", activation, f"one of {ACTIVATIONS}")
    if x.ndim < 1:
        return wrong_value(name, "x", x, "(..., in), at least one dimension")
    for argument, value in weights.items():
        if value.ndim != 2:
            return wrong_value(name, argument, value, "two dimensions, (out, in)")
    if weight_gate.shape[1] != x.shape[-1]:
        wanted = f"(*, {x.shape[-1]}) to match x[..., {x.shape[-1]}]"
        return wrong_value(name, "weight_gate", weight_gate, wanted)
    if weight_up.shape != weight_gate.shape:
        wanted = f"{tuple(weight_gate.shape)} as weight_gate has"
        return wrong_value(name, "weight_up", weight_up, wanted)
    hidden = weight_gate.shape[0]
    if weight_down.shape[1] != hidden:
        wanted = f"(*, {hidden}) to match weight_gate ({hidden}, *)"
        return wrong_value(name, "weight_down", weight_down, wanted)
    if not x.is_floating_point():
        return wrong_type(name, "x", x, "a floating dtype (float32, bfloat16 or float16)")
    for argument, value in weights.items():
        if value.dtype != x.dtype:
            return wrong_type(name, argument, value, f"{x.dtype} as x has")
        if value.device != x.device:
            return wrong_value(name, argument, value, f"{x.device}, where x is")
    return None


@gated_mlp.requires
def requires(x, weight_gate, weight_up, weight_down, *, activation):
    if x.dtype not in FLOATS:
        return f"{x.dtype} has no kernels here (float32, bfloat16 and float16 have)"
    return None


@gated_mlp.forward
def forward(needs, x, weight_gate, weight_up, weight_down, *, activation):
    rows = _rows(x)
    gate, up = F.linear(rows, weight_gate), F.linear(rows, weight_up)
    h = gated_activation(gate, up, activation, overwrite=not any(needs))
    shape = (*x.shape[:-1], weight_down.shape[0])
    if not any(needs):
        del gate, up  # before the third GEMM allocates
        return F.linear(h, weight_down).view(shape), ()
    y = F.linear(h, weight_down).view(shape)
    inner = needs.x or needs.weight_gate or needs.weight_up
    return y, (
        x if needs.weight_gate or needs.weight_up else None,
        weight_gate if needs.x else None,
        weight_up if needs.x else None,
        weight_down if inner else None,
        gate, up,
    )  # fmt: skip


@gated_mlp.backward
def backward(needs, kept, dy, *, activation):
    x, weight_gate, weight_up, weight_down, gate, up = kept
    leading, dy = dy.shape[:-1], _rows(dy)
    dx = dweight_gate = dweight_up = dweight_down = None
    if weight_down is not None:
        dgate, dup, h = gated_activation_backward(
            gate, up, torch.mm(dy, weight_down), activation, want_h=needs.weight_down
        )
        gate = up = None
    else:
        h = gated_activation(gate, up, activation)
    if h is not None:
        dweight_down = torch.mm(dy.t(), h)
    del h  # the largest temporaries first out
    if needs.x:
        dx = torch.mm(dgate, weight_gate)
    if needs.weight_gate:
        dweight_gate = torch.mm(dgate.t(), _rows(x))
    if weight_down is not None:
        del dgate
    if dx is not None:
        dx = dx.addmm_(dup, weight_up).view(*leading, dx.shape[1])
    if needs.weight_up:
        dweight_up = torch.mm(dup.t(), _rows(x))
    return dx, dweight_gate, dweight_up, dweight_down


def _rows(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@gated_mlp.cost
def cost(x, weight_gate, weight_up, weight_down, *, activation):
    rows, weights = x.shape[:-1].numel(), (weight_gate, weight_up, weight_down)
    flops = 2 * rows * sum(w.numel() for w in weights)
    element = x.element_size()
    middle = 2 * rows * weight_gate.shape[0] * element
    y = rows * weight_down.shape[0] * element
    return Cost(
        forward_flops=flops,
        forward_bytes=nbytes(x, *weights) + middle + y,
        backward_flops=2 * flops,
        backward_bytes=2 * nbytes(x, *weights) + middle + y,
    )


@gated_mlp.inputs(
    test=[
        dict(shape=(1, 1), hidden=1, out=1),
        dict(shape=(3, 17), hidden=9, out=5, activation="gelu"),
        dict(shape=(2, 33, 24), hidden=40, out=24),
        dict(shape=(3, 9, 16), drop_first=1, hidden=264, out=24, activation="relu"),
    ],
    bench={
        "Llama-3.2-11B-Vision, 4 x 512": dict(shape=(4, 512, 4096), hidden=14336, out=4096),
        "IDEFICS-9B, a step of 8": dict(shape=(8, 1, 4096), hidden=11008, out=4096),
        "Idefics2 perceiver, 8 images": dict(shape=(8, 64, 4096), hidden=16384, out=4096),
    },
)
def inputs(shape, hidden, out, *, drop_first=0):
    x = torch.randn(shape)[..., drop_first:, :] if drop_first else torch.randn(shape)
    inner = shape[-1]
    return (
        x,
        torch.randn(hidden, inner) * inner**-0.5,
        torch.randn(hidden, inner) * inner**-0.5,
        torch.randn(out, hidden) * hidden**-0.5,
    )
