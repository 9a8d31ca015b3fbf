"""A residual with a tanh gate, and the LayerNorm or RMSNorm that follows it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels import gated_add as kernels
from vlm_fast.ops.declaration import Cost, nbytes, op
from vlm_fast.ops.gated_add import gated_add, sample_inputs, wanted_gradients, why_no_kernel
from vlm_fast.ops.rows import as_matrix

NORMS = ("layer", "rms")


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
    """Compute a gated residual ``h = gated_add(x, y, gate, row_mask)`` and its norm in one pass.

    Statistics are fp32. The same calls fall back as those of `gated_add`.

    Args:
        x: Rows at any pitch are not copied.
        gate: One element, or one per feature with all other sizes 1.
        bias: Bias of a LayerNorm; an RMSNorm has none.
        row_mask: False for rows where y is read as zeros, even where it holds NaN.
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


@gated_add_norm.fallback_reason
def fallback_reason(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None,
    row_mask: Tensor | None, *, eps: float, norm: str,
) -> str | None:  # fmt: skip
    return why_no_kernel(x)


@gated_add_norm.forward
def forward(
    needs_grad: Any, x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None,
    row_mask: Tensor | None, *, eps: float, norm: str,
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor | None, ...]]:  # fmt: skip
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
    past_bias = needs_grad.x or needs_grad.y or needs_grad.gate or needs_grad.weight
    return (h, normed), (
        y if needs_grad.gate else None, gate, row_mask, weight, h if past_bias else None,
        *(statistics if past_bias else (None, None)),
    )  # fmt: skip


@gated_add_norm.backward
def backward(
    needs_grad: Any, saved_tensors: Any, dh: Tensor, dnormed: Tensor, *, eps: float, norm: str
) -> tuple[Tensor | None, ...]:
    y, gate, row_mask, weight, h, mean, rstd = saved_tensors
    if h is None:  # only the bias needs a gradient
        dbias = as_matrix(dnormed).sum(0, dtype=weight.dtype)
        return None, None, None, None, dbias, None
    dx, dy, dgate, dweight, dbias = wanted_gradients(
        needs_grad, dh, dnormed, h, (mean, rstd), y, gate, row_mask, weight, norm
    )
    return dx, dy, dgate, dweight, dbias, None


@gated_add_norm.non_differentiable
def non_differentiable(needs_grad: Any) -> tuple[int, ...]:
    # The first result, h, depends on neither weight nor bias.
    return () if needs_grad.x or needs_grad.y or needs_grad.gate else (0,)


@gated_add_norm.cost
def cost(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None,
    row_mask: Tensor | None, *, eps: float, norm: str,
) -> Cost:  # fmt: skip
    rows, parameters = nbytes(x), nbytes(gate, weight, bias)
    return Cost(
        forward_flops=9 * x.numel(),
        forward_bytes=4 * rows + parameters + nbytes(row_mask),
        backward_flops=15 * x.numel(),
        backward_bytes=6 * rows + 2 * parameters + nbytes(row_mask),
    )


@gated_add_norm.inputs(
    smallest=dict(shape=(1, 1), eps=0.01, biased=True),
    usual=dict(shape=(3, 17), per_feature=True, norm="rms"),
    others=[
        dict(shape=(40, 100), biased=True, eps=0.5),
        dict(shape=(3, 17, 24), drop_first=1, hidden=True, norm="rms", eps=0.5),
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
def inputs(
    shape: tuple[int, ...], *, biased: bool = False, **others: Any
) -> tuple[Tensor | None, ...]:
    x, y, gate, row_mask = sample_inputs(shape, **others)
    weight = 1 + torch.randn(shape[-1]) * 0.1
    return x, y, gate, weight, torch.randn(shape[-1]) * 0.1 if biased else None, row_mask
