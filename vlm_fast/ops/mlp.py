"""Two linear layers with an activation between, as in the projector of LLaVA."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels import _hopper
from vlm_fast.kernels._activation import ACTIVATIONS
from vlm_fast.kernels._launcher import runs_triton
from vlm_fast.kernels._linear_activation import FEW_ROWS, linear_activation
from vlm_fast.kernels._packed_weights import input_gradient
from vlm_fast.kernels.mlp import ATEN, ATEN_IN_PLACE, activate, mlp_activation_backward
from vlm_fast.ops.declaration import Cost, linear_op, nbytes
from vlm_fast.ops.rows import as_matrix

SAVED = ("all", "preactivation", "input")


@linear_op(
    x="floating (..., in)",
    weight_1="like x (hidden, in)",
    bias_1="like x (hidden) or None",
    weight_2="like x (out, hidden)",
    bias_2="like x (out) or None",
    activation=ACTIVATIONS,
    saved=SAVED,
)
def mlp(
    x: Tensor, weight_1: Tensor, bias_1: Tensor | None, weight_2: Tensor, bias_2: Tensor | None,
    *, activation: str = "gelu", saved: str = "preactivation",
) -> Tensor:  # fmt: skip
    """Apply two linears with an activation between: ``linear(act(linear(x, w1, b1)), w2, b2)``.

    Mirrors transformers' ``LlavaMultiModalProjector``. GELU (arXiv 1606.08415) is the exact erf
    form unless ``activation`` says otherwise. Dtypes other than fp32, fp16 and bf16 fall back.

    Args:
        x: Rows at one pitch, as in ``hidden[:, 1:]``, are read without a copy in forward, except by
            the optional GEMM for Hopper.
        saved: What backward keeps. "all": x, the pre-activation z and the activation, as eager
            PyTorch does. "preactivation": x and z. "input": only x; backward computes z again, at
            the cost of one more GEMM.

    Returns:
        ``(..., out)``, in x's dtype or autocast's.
    """
    return F.linear(activate(F.linear(x, weight_1, bias_1), activation), weight_2, bias_2)


@mlp.forward
def forward(needs_grad, x, weight_1, bias_1, weight_2, bias_2, *, activation, saved):
    h, kept = hidden_and_saved(needs_grad, x, weight_1, bias_1, weight_2, activation, saved)
    return F.linear(h, weight_2, bias_2), kept


def hidden_and_saved(needs_grad, x, weight_1, bias_1, weight_2, activation, saved):
    """The input of the second linear, and the tensors that are saved for backward."""
    if True not in needs_grad:
        inner = x.shape[-1]
        rows = x.numel() // inner if inner else 0
        if 0 < rows <= FEW_ROWS and x.dtype is not torch.float32 and runs_triton(x):
            few = x if x.ndim == 2 else x.reshape(rows, inner)
            few = few if few.stride(1) == 1 else few.contiguous()
            h = linear_activation(few, weight_1, bias_1, activation)
            return h if x.ndim == 2 else h.view(*x.shape[:-1], h.shape[1]), ()
        return _first_linear(x, weight_1, bias_1, activation, keep_z=False)[1], ()
    need_x, need_weight_1, need_bias_1, need_weight_2, _ = needs_grad
    before_z = need_x or need_weight_1 or need_bias_1
    rebuild = saved == "input"
    keep_z = not rebuild and (before_z or need_weight_2)
    whole = before_z and _takes_whole_rows(x, weight_2, activation)
    z, h = _first_linear(x, weight_1, bias_1, activation, keep_z, whole)
    return h, (
        x if need_weight_1 or rebuild else None,
        weight_1 if need_x or rebuild else None,
        bias_1 if rebuild else None,
        weight_2 if before_z else None,
        z,
        h if saved == "all" and need_weight_2 else None,
    )


@mlp.backward
def backward(
    needs_grad: Any, saved_tensors: Any, dy: Tensor, *, activation: str, saved: str
) -> tuple[Tensor | None, ...]:
    return gradients(needs_grad, saved_tensors, dy, activation, saved)


def gradients(
    needs_grad: Any, saved_tensors: Any, dy: Tensor, activation: str, saved: str,
    residual: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """All gradients; ``residual``, of the rows of x, is added to that of x."""
    x, weight_1, bias_1, weight_2, z, h = saved_tensors
    leading, dy = dy.shape[:-1], as_matrix(dy)
    if saved == "input":
        whole = _takes_whole_rows(x, weight_2, activation)
        z = F.linear(x.contiguous() if whole else _gemm_input(x), weight_1, bias_1)
    want_h = needs_grad.weight_2 and h is None
    dx = dweight_1 = dbias_1 = dweight_2 = dbias_2 = None
    if needs_grad.x or needs_grad.weight_1 or needs_grad.bias_1:
        dz, fresh_h, dbias_1, dbias_2 = _second_linear_backward(
            z, dy, weight_2, leading, activation, want_h, needs_grad.bias_1, needs_grad.bias_2,
            saved == "input",
        )  # fmt: skip
        z, h = None, fresh_h if want_h else h
    else:
        if want_h:
            h = activate(_without_gaps(z, leading), activation)
        if needs_grad.bias_2:
            dbias_2 = dy.sum(0)
    # The largest temporaries are freed first: h before dz is used.
    if needs_grad.weight_2:
        dweight_2 = torch.mm(dy.t(), as_matrix(h))
    h = fresh_h = None
    if needs_grad.weight_1:
        dweight_1 = torch.mm(dz.t(), as_matrix(x))
    if needs_grad.x:
        dx = input_gradient(dz, [weight_1], residual)
        dx = dx if len(leading) == 1 else dx.view(*leading, dx.shape[1])
    return dx, dweight_1, dbias_1, dweight_2, dbias_2


def _first_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep_z: bool,
    whole: bool = False,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """The pre-activation ``z``, or None if it is not kept, and its activation.

    ``whole``: backward needs z without gaps between images.
    """
    if _hopper.native is not None and activation == "gelu":
        leading, (hidden, inner) = x.shape[:-1], weight.shape
        if _hopper.takes_linear_gelu(x, math.prod(leading), inner, hidden):
            z, h = _hopper.linear_gelu(as_matrix(x), weight, bias, keep_z=keep_z)
            return None if z is None else z.view(*leading, hidden), h.view(*leading, hidden)
    given = x if x.is_contiguous() else x.contiguous() if whole else _gemm_input(x)
    z = F.linear(given, weight, bias)
    rows = z if z.ndim == x.ndim else _without_gaps(z, x.shape[:-1])
    return (z, ATEN[activation](rows)) if keep_z else (None, ATEN_IN_PLACE[activation](rows))


def _second_linear_backward(
    z: Tensor, dy: Tensor, weight: Tensor, leading: torch.Size, activation: str,
    want_h: bool, want_dbias_1: bool, want_dbias_2: bool, overwrite_z: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """``dz``, the activation if wanted (perhaps over z), and the gradients of the biases."""
    tokens, period = _tokens_and_period(z, leading)
    if tokens == period and _takes_whole_rows(dy, weight, activation):
        z = z.view(dy.shape[0], weight.shape[1])
        dz, h, dbias_1 = _hopper.gelu_backward(
            z, dy, weight, want_h=want_h, want_dbias=want_dbias_1
        )
        return dz, h, dbias_1, dy.sum(0) if want_dbias_2 else None
    return mlp_activation_backward(
        z, torch.mm(dy, weight), dy, tokens, period, activation,
        want_h=want_h, want_dbias=want_dbias_1, want_dbias_2=want_dbias_2, overwrite_z=overwrite_z,
    )  # fmt: skip


def _takes_whole_rows(rows: Tensor, weight_2: Tensor, activation: str) -> bool:
    """Whether the GEMM for Hopper serves backward, which needs z without gaps between images."""
    if _hopper.native is None or activation != "gelu":
        return False
    out, hidden = weight_2.shape
    return _hopper.takes_gelu_backward(rows, math.prod(rows.shape[:-1]), hidden, out)


def _gemm_input(x: Tensor) -> Tensor:
    """``x`` in a layout that one GEMM with bias reads, copied only if there is no other way.

    Images with gaps between them, as in ``hidden[:, 1:]``, become one matrix that includes the
    gaps. The results of these extra rows are never read.
    """
    if x.ndim < 3 or x.is_contiguous():
        return x
    if x.ndim == 3:
        images, tokens, features = x.shape
        stride, pitch, inner = x.stride()
        if inner == 1 and images > 1 and tokens > 0 and pitch >= features and stride % pitch == 0:
            period = stride // pitch
            if tokens < period <= tokens + max(tokens // 8, 1):
                return x.as_strided(((images - 1) * period + tokens, features), (pitch, 1))
    return x.contiguous()


def _tokens_and_period(z: Tensor, leading: torch.Size) -> tuple[int, int]:
    """The number of tokens of an image in z, and of rows from one image to the next."""
    if z.ndim != 2 or len(leading) < 2:
        rows = math.prod(leading)  # Size.numel() would fix a dynamic shape
        return rows, rows
    images, tokens = leading
    return tokens, (z.shape[0] - tokens) // (images - 1)


def _without_gaps(z: Tensor, leading: torch.Size) -> Tensor:
    """The rows of z that belong to images: z itself, or a view that skips the gaps."""
    if z.ndim != 2 or len(leading) < 2:
        return z
    tokens, period = _tokens_and_period(z, leading)
    cols = z.shape[1]
    return z.as_strided((leading[0], tokens, cols), (period * cols, cols, 1))


@mlp.cost
def cost(x, weight_1, bias_1, weight_2, bias_2, *, activation, saved):
    rows, hidden, out = x.shape[:-1].numel(), weight_1.shape[0], weight_2.shape[0]
    element, flops = x.element_size(), 2 * rows * (weight_1.numel() + weight_2.numel())
    weights = nbytes(weight_1, bias_1, weight_2, bias_2)
    z, y = rows * hidden * element, rows * out * element
    return Cost(
        forward_flops=flops,
        forward_bytes=nbytes(x) + weights + y + z,
        backward_flops=2 * flops + (2 * rows * weight_1.numel() if saved == "input" else 0),
        backward_bytes=2 * nbytes(x) + 2 * weights + y + z,
    )


@mlp.inputs(
    smallest=dict(shape=(1, 1), hidden=1, out=1),
    usual=dict(shape=(3, 17, 7), hidden=5, out=9, activation="silu"),
    others=[
        dict(shape=(257, 24), hidden=100, out=40),
        dict(shape=(2, 65, 72), hidden=80, out=33, activation="gelu_tanh", saved="input"),
        dict(shape=(3, 17, 24), drop_first=1, hidden=136, out=16, saved="all"),
        dict(shape=(2, 130, 40), drop_first=1, hidden=264, out=24),
        dict(shape=(5, 24), hidden=300, out=24, activation="quick_gelu"),
        dict(shape=(140, 16), hidden=48, out=8, activation="relu", bias=False),
    ],
    large=dict(shape=(5, 107_000, 64), hidden=4096, out=64),
    bench={
        "LLaVA-1.5-7B, 1 image": dict(shape=(1, 577, 1024), drop_first=1, hidden=4096, out=4096),
        "LLaVA-1.5-7B, 8 images": dict(shape=(8, 577, 1024), drop_first=1, hidden=4096, out=4096),
        "LLaVA-OneVision-7B, 16 tiles": dict(shape=(16, 729, 1152), hidden=3584, out=3584),
        "BLIP-2 Q-Former, 16 images": dict(shape=(16, 32, 768), hidden=3072, out=768),
        "BLIP-2 Q-Former, 1 image": dict(shape=(1, 32, 768), hidden=3072, out=768),
        "BLIP-2-wide, 257 tokens": dict(shape=(8, 257, 1408), hidden=4096, out=4096),
    },
)
def inputs(
    shape: tuple[int, ...], hidden: int, out: int, *, drop_first: int = 0, bias: bool = True
) -> tuple[Tensor | None, ...]:
    x = torch.randn(shape)[..., drop_first:, :] if drop_first else torch.randn(shape)
    inner = shape[-1]
    return (
        x,
        torch.randn(hidden, inner) * inner**-0.5,
        torch.randn(hidden) * 0.1 if bias else None,
        torch.randn(out, hidden) * hidden**-0.5,
        torch.randn(out) * 0.1 if bias else None,
    )
