"""An activation, gated or not, and a linear layer: what follows a linear in many projectors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels._activation import ACTIVATIONS
from vlm_fast.kernels.gated_mlp import gated_activation, gated_activation_backward
from vlm_fast.kernels.mlp import activate, mlp_activation_backward
from vlm_fast.ops.declaration import Cost, linear_op, nbytes
from vlm_fast.ops.rows import as_matrix


@linear_op(
    z="floating (..., features)",
    weight="like z (out, inner)",
    bias="like z (out) or None",
    activation=ACTIVATIONS,
    where={
        "features == (2 * inner if gated else inner)": (
            "weight: (out, inner), where z has {features} features, twice inner if gated"
        )
    },
)
def act_linear(
    z: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str = "gelu",
    gated: bool = False,
) -> Tensor:  # fmt: skip
    """Apply an activation, then a linear: ``linear(act(z), weight, bias)``. Backward keeps only z.

    Eager PyTorch keeps z and its activation. For linear, act, linear, act, linear it keeps five
    tensors; `mlp` followed by this op keeps three. Dtypes other than fp32, fp16 and bf16 fall back.

    Args:
        gated: z holds two halves; the activation of the second is multiplied by the first, as in
            transformers' ``AyaVisionMultiModalProjector``. Eager PyTorch then keeps four tensors.

    Returns:
        ``(..., out)``, in z's dtype or autocast's.
    """
    if gated:
        up, gate = z.chunk(2, -1)
        return F.linear(activate(gate, activation) * up, weight, bias)
    return F.linear(activate(z, activation), weight, bias)


@act_linear.forward
def forward(
    needs_grad: Any, z: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str,
    gated: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:  # fmt: skip
    if gated:
        up, gate = as_matrix(z).chunk(2, 1)
        h = gated_activation(gate, up, activation)
        y = F.linear(h, weight, bias).view(*z.shape[:-1], weight.shape[0])
    else:
        y = F.linear(activate(z, activation), weight, bias)
    return y, (z if needs_grad.z or needs_grad.weight else None, weight if needs_grad.z else None)


@act_linear.backward
def backward(
    needs_grad: Any, saved_tensors: Any, dy: Tensor, *, activation: str, gated: bool
) -> tuple[Tensor | None, ...]:
    z, weight = saved_tensors
    leading, dy = dy.shape[:-1], as_matrix(dy)
    dz = h = dweight = dbias = None
    if gated:
        dz, h = _gated_backward(needs_grad, z, weight, dy, activation)
        dz = dz if dz is None else dz.view(*leading, dz.shape[1])
        dbias = dy.sum(0) if needs_grad.bias else None
    elif needs_grad.z:
        rows = dy.shape[0]
        dz, h, _, dbias = mlp_activation_backward(
            as_matrix(z).contiguous(), torch.mm(dy, weight), dy, rows, rows, activation,
            want_h=needs_grad.weight, want_dbias=False, want_dbias_2=needs_grad.bias,
        )  # fmt: skip
        dz = dz.view(*leading, dz.shape[1])
    else:
        h = as_matrix(activate(z, activation)) if needs_grad.weight else None
        dbias = dy.sum(0) if needs_grad.bias else None
    if h is not None:
        dweight = torch.mm(dy.t(), h)
    return dz, dweight, dbias


def _gated_backward(
    needs_grad: Any, z: Tensor | None, weight: Tensor | None, dy: Tensor, activation: str
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of z, and the input of the linear; None where it is not needed."""
    if z is None:
        return None, None
    up, gate = as_matrix(z).chunk(2, 1)
    if weight is None:
        return None, gated_activation(gate, up, activation)
    dz = dy.new_empty(gate.shape[0], 2 * gate.shape[1])
    if gate.stride(0) != dz.stride(0):
        up, gate = as_matrix(z).contiguous().chunk(2, 1)
    dup, dgate = dz.chunk(2, 1)
    *_, h = gated_activation_backward(
        gate, up, torch.mm(dy, weight), activation, want_h=needs_grad.weight, into=(dgate, dup)
    )
    return dz, h


@act_linear.cost
def cost(z: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str, gated: bool) -> Cost:
    rows = z.shape[:-1].numel()
    flops, y = 2 * rows * weight.numel(), rows * weight.shape[0] * z.element_size()
    moved = nbytes(z, weight, bias)
    return Cost(flops, moved + y, 2 * flops, 2 * moved + y)


@act_linear.inputs(
    smallest=dict(shape=(1, 1), out=1),
    usual=dict(shape=(3, 17), out=5, activation="silu"),
    others=[
        dict(shape=(257, 100), out=24),
        dict(shape=(2, 65, 72), out=33, activation="gelu_tanh"),
        dict(shape=(3, 17, 136), drop_first=1, out=16),
        dict(shape=(5, 300), out=24, activation="quick_gelu"),
        dict(shape=(140, 48), out=8, activation="relu", bias=False),
        dict(shape=(2, 65, 72), out=33, activation="silu", gated=True),
        dict(shape=(3, 17, 136), drop_first=1, out=16, gated=True),
    ],
    large=dict(shape=(5, 107_000, 4096), out=64),
    bench={
        "LLaVA mlp3x, 1 image": dict(shape=(1, 576, 4096), out=4096),
        "LLaVA mlp3x, 8 images": dict(shape=(8, 576, 4096), out=4096),
        "Aya Vision, 13 tiles": dict(
            shape=(13, 196, 28672), out=4096, activation="silu", gated=True
        ),
    },
)
def inputs(
    shape: tuple[int, ...], out: int, *, drop_first: int = 0, bias: bool = True,
    gated: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    z = torch.randn(shape)[..., drop_first:, :] if drop_first else torch.randn(shape)
    inner = shape[-1] // (1 + gated)
    return (
        z,
        torch.randn(out, inner) * inner**-0.5,
        torch.randn(out) * 0.1 if bias else None,
    )
