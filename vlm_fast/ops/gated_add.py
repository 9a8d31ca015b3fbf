"""The tanh gate of Flamingo's cross-attention, with the residual and the norm that follows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels import gated_add as kernels
from vlm_fast.ops.declaration import Cost, nbytes, no_kernel_for, op

MAX_FEATURES = 8192
NORMS = ("layer", "rms")


@op(
    x="floating (*rows, features)",
    y="like x (*rows, features)",
    gate="like x or float32",
    row_mask="bool (*rows) or None",
    where={
        "gate.numel() == 1 or (gate.numel() == features == gate.shape[-1])": (
            "gate: one element, or ({features},) to match x"
        ),
    },
)
def gated_add(x: Tensor, y: Tensor, gate: Tensor, row_mask: Tensor | None = None) -> Tensor:
    """A residual with a tanh gate: ``x + tanh(gate) * y``.

    Flamingo, arXiv 2204.14198, section 3.1.2. Mirrors transformers'
    ``IdeficsGatedCrossAttentionLayer`` and ``MllamaCrossAttentionDecoderLayer``. NaN and infinities
    of y reach the result even where the gate is 0. Dtypes other than fp32, fp16 and bf16, and more
    than 8192 features, fall back.

    Args:
        x: Rows at any pitch are not copied.
        gate: One element, or one per feature with all other sizes 1.
        row_mask: False where a row of y counts as zeros, whatever it holds.

    Returns:
        The shape and dtype of x.
    """
    if row_mask is not None:
        y = torch.where(row_mask.unsqueeze(-1), y, 0)
    return x + (gate.tanh().view(-1) * y).to(x.dtype)


@op(
    x="floating (*rows, features)",
    y="like x (*rows, features)",
    gate="like x or float32",
    weight="like x or float32 (features)",
    bias="like weight (features) or None",
    row_mask="bool (*rows) or None",
    norm=NORMS,
    where={
        "gate.numel() == 1 or (gate.numel() == features == gate.shape[-1])": (
            "gate: one element, or ({features},) to match x"
        ),
        "norm == 'layer' or bias is None": "bias: None for an RMSNorm",
    },
)
def gated_add_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    row_mask: Tensor | None = None,
    *,
    eps: float = 1e-5,
    norm: str = "layer",
) -> tuple[Tensor, Tensor]:
    """A gated residual ``h = gated_add(x, y, gate, row_mask)`` and its norm, in one pass.

    Statistics are fp32. What falls back is described at `gated_add`.

    Args:
        x: Rows at any pitch are not copied.
        gate: One element, or one per feature with all other sizes 1.
        bias: Of a LayerNorm only.
        row_mask: False where a row of y counts as zeros, whatever it holds.
        eps: Added to the variance, or to the mean square.
        norm: "layer" (arXiv 1607.06450), or "rms" (arXiv 1910.07467) in Llama's form, which rounds
            to x's dtype before it multiplies by the weight.

    Returns:
        h and its norm, both with the shape and dtype of x.
    """
    h = gated_add.reference(x, y, gate, row_mask)
    features = h.shape[-1]
    if norm == "layer":
        bias = None if bias is None else bias.to(h.dtype)
        return h, F.layer_norm(h, (features,), weight.to(h.dtype), bias, eps)
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return h, (weight * unit.to(h.dtype)).to(h.dtype)


@gated_add.fallback_reason
def fallback_reason(x, y, gate, row_mask):
    return _reason(x)


@gated_add_norm.fallback_reason
def fallback_reason_norm(x, y, gate, weight, bias, row_mask, *, eps, norm):
    return _reason(x)


def _reason(x):
    if x.shape[-1] > MAX_FEATURES:
        return f"{x.shape[-1]} features are more than {MAX_FEATURES}, the most per program"
    return no_kernel_for(x)


@gated_add.forward
def forward(needs_grad, x, y, gate, row_mask):
    if x.numel() == 0:
        h = torch.empty_like(x, memory_format=torch.contiguous_format)
    else:
        h = kernels.gated_add(x, y, gate.contiguous(), row_mask)[0]
    if not any(needs_grad):
        return h, ()
    return h, (
        y if needs_grad.gate else None,
        gate if needs_grad.gate or needs_grad.y else None,
        row_mask,
    )


@gated_add.backward
def backward(needs_grad, saved_tensors, dh):
    y, gate, row_mask = saved_tensors
    dy = dgate = None
    if gate is not None:
        _, dy, dgate, _, _ = _gradients(
            needs_grad, dh, None, None, (None, None), y, gate, row_mask, None, "none"
        )
    return dh if needs_grad.x else None, dy, dgate, None


@gated_add_norm.forward
def forward_norm(needs_grad, x, y, gate, weight, bias, row_mask, *, eps, norm):
    normed: Tensor | None
    statistics: kernels.Statistics = (None, None)
    if x.numel() == 0:
        h = torch.empty_like(x, memory_format=torch.contiguous_format)
        normed = torch.empty_like(h)
    else:
        h, normed, statistics = kernels.gated_add(
            x, y, gate.contiguous(), row_mask, weight.contiguous(),
            None if bias is None else bias.contiguous(), eps=eps, norm=norm,
        )  # fmt: skip
    if not any(needs_grad):
        return (h, normed), ()
    inner = needs_grad.x or needs_grad.y or needs_grad.gate or needs_grad.weight
    return (h, normed), (
        y if needs_grad.gate else None, gate, row_mask, weight, h if inner else None,
        *(statistics if inner else (None, None)), bias.new_empty(0) if needs_grad.bias else None,
    )  # fmt: skip


@gated_add_norm.backward
def backward_norm(needs_grad, saved_tensors, dh, dnormed, *, eps, norm):
    y, gate, row_mask, weight, h, mean, rstd, bias_like = saved_tensors
    if h is None:  # the bias alone
        dbias = dnormed.sum_to_size(dnormed.shape[-1:]).to(bias_like.dtype)
        return None, None, None, None, dbias, None
    dx, dy, dgate, dweight, dbias = _gradients(
        needs_grad, dh, dnormed, h, (mean, rstd), y, gate, row_mask, weight, norm
    )
    return (
        dx, dy, dgate,
        dweight.to(weight.dtype) if needs_grad.weight else None,
        dbias.to(bias_like.dtype) if needs_grad.bias else None,
        None,
    )  # fmt: skip


@gated_add_norm.non_differentiable
def constants_norm(needs_grad):
    return (
        () if needs_grad.x or needs_grad.y or needs_grad.gate else (0,)
    )  # h knows no weight and no bias


def _gradients(needs_grad, dh, dnormed, h, statistics, y, gate, row_mask, weight, norm):
    """Those that are wanted, None for the others; of x, y, gate, weight and bias."""
    features = dh.shape[-1]
    if dh.numel() == 0:
        zeros = dh.new_zeros(features)
        dgate = torch.zeros_like(gate) if needs_grad.gate else None
        return dh, dh, dgate, zeros, zeros.clone()
    dx, dy, dgate, dweight, dbias = kernels.gated_add_backward(
        dh, dnormed, h, statistics, y, gate.contiguous(), row_mask,
        None if weight is None else weight.contiguous(), norm=norm,
        want_x=needs_grad.x and norm != "none", want_y=needs_grad.y, want_gate=needs_grad.gate,
        want_weight=getattr(needs_grad, "weight", False),
        want_bias=getattr(needs_grad, "bias", False),
    )  # fmt: skip
    return (
        dx, dy,
        None if dgate is None else dgate.view(gate.shape).to(gate.dtype),
        dweight, dbias,
    )  # fmt: skip


@gated_add.cost
def cost(x, y, gate, row_mask):
    rows = nbytes(x)
    return Cost(
        forward_flops=2 * x.numel(),
        forward_bytes=3 * rows + nbytes(gate, row_mask),
        backward_flops=3 * x.numel(),
        backward_bytes=3 * rows + 2 * nbytes(gate) + nbytes(row_mask),
    )


@gated_add_norm.cost
def cost_norm(x, y, gate, weight, bias, row_mask, *, eps, norm):
    rows, beside = nbytes(x), nbytes(gate, weight, bias)
    return Cost(
        forward_flops=9 * x.numel(),
        forward_bytes=4 * rows + beside + nbytes(row_mask),
        backward_flops=15 * x.numel(),
        backward_bytes=6 * rows + 2 * beside + nbytes(row_mask),
    )


@gated_add.inputs(
    smallest=dict(shape=(1, 1)),
    usual=dict(shape=(3, 17), per_feature=True),
    others=[
        dict(shape=(3, 17, 24), drop_first=1, hidden=True),
        dict(shape=(5, 1152)),
    ],
    large=dict(shape=(5, 107_000, 4096)),
    bench={
        "Flamingo, 8 x 2048, 4096 wide": dict(shape=(8, 2048, 4096)),
        "a step of 8, 4096 wide": dict(shape=(8, 1, 4096)),
        "Llama-3.2-11B-Vision, 4 x 512": dict(shape=(4, 512, 4096), hidden=True),
    },
)
def inputs(shape, **others):
    return _inputs(shape, **others)


def _inputs(shape, *, drop_first=0, per_feature=False, hidden=False):
    x, y = torch.randn(shape), torch.randn(shape)
    if drop_first:
        x, y = x[..., drop_first:, :], y[..., :-drop_first, :]
    gate = torch.randn(shape[-1]) if per_feature else torch.full((1,), 0.4)
    row_mask = None
    if hidden:
        rows = x.shape[:-1].numel()
        row_mask = (torch.arange(rows) % 3 != 1).view(x.shape[:-1])
    return x, y, gate, row_mask


@gated_add_norm.inputs(
    smallest=dict(shape=(1, 1), eps=0.01, biased=True),
    usual=dict(shape=(3, 17), per_feature=True, norm="rms"),
    others=[
        dict(shape=(40, 100), biased=True),
        dict(shape=(3, 17, 24), drop_first=1, hidden=True, norm="rms"),
        dict(shape=(2, 5, 72), hidden=True),
        dict(shape=(3, 1152), biased=True),
    ],
    large=dict(shape=(5, 107_000, 4096)),
    bench={
        "Llama-3.2-11B-Vision, 4 x 512": dict(shape=(4, 512, 4096), norm="rms"),
        "Flamingo, 8 x 2048, 4096 wide": dict(shape=(8, 2048, 4096), biased=True),
        "OpenFlamingo-3B, 8 x 2048, 2048 wide": dict(shape=(8, 2048, 2048), biased=True),
        "IDEFICS-9B, a step of 8": dict(shape=(8, 1, 4096), norm="rms"),
    },
)
def inputs_norm(shape, *, biased=False, **others):
    x, y, gate, row_mask = _inputs(shape, **others)
    weight = 1 + torch.randn(shape[-1]) * 0.1
    return x, y, gate, weight, torch.randn(shape[-1]) * 0.1 if biased else None, row_mask
