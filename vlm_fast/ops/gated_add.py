"""A residual with a tanh gate, as in Flamingo's cross-attention layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_fast.kernels import gated_add as kernels
from vlm_fast.ops.declaration import Cost, nbytes, no_kernel_for, op

MAX_FEATURES = 8192


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
    """Add a gated branch to a residual: ``x + tanh(gate) * y``.

    Flamingo, arXiv 2204.14198, section 3.1.2. Mirrors transformers'
    ``IdeficsGatedCrossAttentionLayer`` and ``MllamaCrossAttentionDecoderLayer``. NaN and infinities
    of y reach the result even where the gate is 0. Dtypes other than fp32, fp16 and bf16, and more
    than 8192 features, fall back.

    Args:
        x: Rows at any pitch are not copied.
        gate: One element, or one per feature with all other sizes 1.
        row_mask: False for rows where y is read as zeros, even where it holds NaN.

    Returns:
        The shape and dtype of x.
    """
    if row_mask is not None:
        y = torch.where(row_mask.unsqueeze(-1), y, 0)
    return x + (gate.tanh().view(-1) * y).to(x.dtype)


@gated_add.fallback_reason
def fallback_reason(x: Tensor, y: Tensor, gate: Tensor, row_mask: Tensor | None) -> str | None:
    return why_no_kernel(x)


def why_no_kernel(x: Tensor) -> str | None:
    """Why no kernel takes rows of this width and dtype, or None."""
    if x.shape[-1] > MAX_FEATURES:
        return f"{x.shape[-1]} features are more than {MAX_FEATURES}, the most per program"
    return no_kernel_for(x)


@gated_add.forward
def forward(
    needs_grad: Any, x: Tensor, y: Tensor, gate: Tensor, row_mask: Tensor | None
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
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
def backward(needs_grad: Any, saved_tensors: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    y, gate, row_mask = saved_tensors
    dy = dgate = None
    if gate is not None:
        _, dy, dgate, _, _ = wanted_gradients(
            needs_grad, dh, None, None, (None, None), y, gate, row_mask, None, "none"
        )
    return dh if needs_grad.x else None, dy, dgate, None


def wanted_gradients(
    needs_grad: Any,
    dh: Tensor,
    dnormed: Tensor | None,
    h: Tensor | None,
    statistics: kernels.Statistics,
    y: Tensor | None,
    gate: Tensor,
    row_mask: Tensor | None,
    weight: Tensor | None,
    norm: str,
) -> tuple[Any, ...]:
    """Gradients of x, y, gate, weight and bias; those that are not needed may be None."""
    features = dh.shape[-1]
    if dh.numel() == 0:
        zeros = (dh if weight is None else weight).new_zeros(features)
        dgate = torch.zeros_like(gate) if needs_grad.gate else None
        return dh, dh, dgate, zeros, zeros.clone()
    return kernels.gated_add_backward(
        dh, dnormed, h, statistics, y, gate.contiguous(), row_mask,
        None if weight is None else weight.contiguous(), norm=norm,
        want_x=needs_grad.x and norm != "none", want_y=needs_grad.y, want_gate=needs_grad.gate,
        want_weight=getattr(needs_grad, "weight", False),
        want_bias=getattr(needs_grad, "bias", False),
    )  # fmt: skip


@gated_add.cost
def cost(x: Tensor, y: Tensor, gate: Tensor, row_mask: Tensor | None) -> Cost:
    rows = nbytes(x)
    return Cost(
        forward_flops=2 * x.numel(),
        forward_bytes=3 * rows + nbytes(gate, row_mask),
        backward_flops=3 * x.numel(),
        backward_bytes=3 * rows + 2 * nbytes(gate) + nbytes(row_mask),
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
def inputs(shape: tuple[int, ...], **others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return sample_inputs(shape, **others)


def sample_inputs(
    shape: tuple[int, ...], *, drop_first: int = 0, per_feature: bool = False, hidden: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, y, gate and row mask for tests: x and y of ``shape`` without their first tokens.

    ``per_feature`` gives a gate for each feature, ``hidden`` a mask that hides every third row.
    """
    x, y = torch.randn(shape), torch.randn(shape)
    if drop_first:
        x, y = x[..., drop_first:, :], y[..., :-drop_first, :]
    gate = torch.randn(shape[-1]) if per_feature else torch.full((1,), 0.4)
    row_mask = None
    if hidden:
        rows = x.shape[:-1].numel()
        row_mask = (torch.arange(rows) % 3 != 1).view(x.shape[:-1])
    return x, y, gate, row_mask
