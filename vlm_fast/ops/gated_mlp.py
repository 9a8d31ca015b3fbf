"""A gated MLP such as SwiGLU, as in Llama's decoder layers and many resamplers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels._activation import ACTIVATIONS
from vlm_fast.kernels.gated_mlp import gated_activation, gated_activation_backward
from vlm_fast.kernels.mlp import activate
from vlm_fast.ops.declaration import Cost, linear_op, nbytes
from vlm_fast.ops.rows import as_matrix


@linear_op(
    x="floating (..., in)",
    weight_gate="like x (hidden, in)",
    weight_up="like x (hidden, in)",
    weight_down="like x (out, hidden)",
    activation=ACTIVATIONS,
)
def gated_mlp(
    x: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    weight_down: Tensor,
    *,
    activation: str = "silu",
) -> Tensor:
    """Gate an MLP as SwiGLU does: ``linear(act(linear(x, w_gate)) * linear(x, w_up), w_down)``.

    GLU variants, arXiv 2002.05202. Mirrors transformers' ``MllamaTextMLP``, ``Idefics2MLP`` and the
    ``IdeficsMLP`` of the decoder. Backward keeps x and both products of the first two linears.
    Dtypes other than fp32, fp16 and bf16 fall back.

    Returns:
        ``(..., out)``, in x's dtype or autocast's.
    """
    h = activate(F.linear(x, weight_gate), activation) * F.linear(x, weight_up)
    return F.linear(h, weight_down)


@gated_mlp.forward
def forward(
    needs_grad: Any, x: Tensor, weight_gate: Tensor, weight_up: Tensor, weight_down: Tensor,
    *, activation: str,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:  # fmt: skip
    rows = as_matrix(x)
    gate, up = F.linear(rows, weight_gate), F.linear(rows, weight_up)
    h = gated_activation(gate, up, activation, overwrite=not any(needs_grad))
    shape = (*x.shape[:-1], weight_down.shape[0])
    if not any(needs_grad):
        del gate, up  # freed before the third GEMM allocates its result
        return F.linear(h, weight_down).view(shape), ()
    y = F.linear(h, weight_down).view(shape)
    before_down = needs_grad.x or needs_grad.weight_gate or needs_grad.weight_up
    return y, (
        x if needs_grad.weight_gate or needs_grad.weight_up else None,
        weight_gate if needs_grad.x else None,
        weight_up if needs_grad.x else None,
        weight_down if before_down else None,
        gate, up,
    )  # fmt: skip


@gated_mlp.backward
def backward(
    needs_grad: Any, saved_tensors: Any, dy: Tensor, *, activation: str
) -> tuple[Tensor | None, ...]:
    x, weight_gate, weight_up, weight_down, gate, up = saved_tensors
    leading, dy = dy.shape[:-1], as_matrix(dy)
    dx = dweight_gate = dweight_up = dweight_down = None
    if weight_down is not None:
        dgate, dup, h = gated_activation_backward(
            gate, up, torch.mm(dy, weight_down), activation, want_h=needs_grad.weight_down
        )
        gate = up = None
    else:
        h = gated_activation(gate, up, activation)
    if h is not None:
        dweight_down = torch.mm(dy.t(), h)
    del h  # the largest temporary is freed first
    if needs_grad.x:
        dx = torch.mm(dgate, weight_gate)
    if needs_grad.weight_gate:
        dweight_gate = torch.mm(dgate.t(), as_matrix(x))
    if weight_down is not None:
        del dgate
    if dx is not None:
        dx = dx.addmm_(dup, weight_up).view(*leading, dx.shape[1])
    if needs_grad.weight_up:
        dweight_up = torch.mm(dup.t(), as_matrix(x))
    return dx, dweight_gate, dweight_up, dweight_down


@gated_mlp.cost
def cost(
    x: Tensor, weight_gate: Tensor, weight_up: Tensor, weight_down: Tensor,
    *, activation: str,
) -> Cost:  # fmt: skip
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
    smallest=dict(shape=(1, 1), hidden=1, out=1),
    usual=dict(shape=(3, 17), hidden=9, out=5, activation="gelu"),
    others=[
        dict(shape=(2, 33, 24), hidden=40, out=24),
        dict(shape=(3, 9, 16), drop_first=1, hidden=264, out=24, activation="relu"),
    ],
    large=dict(shape=(5, 107_000, 64), hidden=4096, out=64),
    bench={
        "Llama-3.2-11B-Vision, 4 x 512": dict(shape=(4, 512, 4096), hidden=14336, out=4096),
        "IDEFICS-9B, a step of 8": dict(shape=(8, 1, 4096), hidden=11008, out=4096),
        "Idefics2 perceiver, 8 images": dict(shape=(8, 64, 4096), hidden=16384, out=4096),
    },
)
def inputs(
    shape: tuple[int, ...], hidden: int, out: int, *, drop_first: int = 0
) -> tuple[Tensor, ...]:
    x = torch.randn(shape)[..., drop_first:, :] if drop_first else torch.randn(shape)
    inner = shape[-1]
    return (
        x,
        torch.randn(hidden, inner) * inner**-0.5,
        torch.randn(hidden, inner) * inner**-0.5,
        torch.randn(out, hidden) * hidden**-0.5,
    )
