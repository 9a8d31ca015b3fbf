"""Self-attention with its projections: one GEMM for queries, keys and values, then one kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels._cross_attention_aten import bias_gradient
from vlm_fast.kernels._packed_weights import input_gradient, linears, parameter_gradients
from vlm_fast.kernels.cross_attention import attention_backward, attention_forward
from vlm_fast.ops.cross_attention import MAX_HEAD_SIZE, cross_attention, score_scale
from vlm_fast.ops.declaration import Cost, linear_op, nbytes, no_kernel_for


@linear_op(
    x="floating (batch, tokens, width)",
    parameters=dict(
        weight_q="like x (features, width)",
        weight_k="like x (features, width)",
        weight_v="like x (features, width)",
        bias_q="like x (features)",
        bias_k="like x (features)",
        bias_v="like x (features)",
    ),
    bias="floating (1|batch, 1|heads, 1|tokens, 1|tokens) or None",
    key_mask="bool (batch, tokens) or None",
    seed="int64 one element or None",
    heads="int from 1",
    dropout="number in [0, 1), needs seed",
    where={"features % heads == 0": "heads: a divisor of the {features} features of the weights"},
)
def self_attention(
    x: Tensor,
    parameters: list[Tensor],
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    heads: int,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Multi-head self-attention with its three projections: one GEMM, then one attention kernel.

    Mirrors the self-attention of transformers' ``Blip2QFormerMultiHeadAttention``:
    `cross_attention` of three linears of ``x``. On a GPU the three weights are concatenated in each
    pass; the concatenation is not kept. A query that sees no key gives zeros. Dtypes other than
    fp32, fp16 and bf16, and heads of more than 128 features, fall back.

    Args:
        bias: Added to the scores. Its gradient forms all scores.
        key_mask: True where a token is seen.
        seed: For dropout of probabilities (see `vlm_fast.kernels._dropout`).
        heads: The number of heads that the features are split into.
        scale: Factor of the scores, ``(features / heads) ** -0.5`` by default.
        dropout: The probability that an attention probability is zeroed.

    Returns:
        ``(batch, tokens, features)``.
    """
    weights, biases = parameters[:3], parameters[3:]
    q, k, v = (
        _heads(F.linear(x, w, b), heads) for w, b in zip(weights, biases, strict=True)
    )  # fmt: skip
    attended = cross_attention.reference(
        q, k, v, None, None, bias, key_mask, seed, scale=scale, dropout=dropout
    )
    return attended.transpose(1, 2).reshape(*x.shape[:2], weights[0].shape[0])


def _heads(x: Tensor, heads: int) -> Tensor:
    """``(batch, tokens, features)`` as ``(batch, heads, tokens, features / heads)``."""
    batch, tokens, features = x.shape
    return x.view(batch, tokens, heads, features // heads).transpose(1, 2)


@self_attention.fallback_reason
def fallback_reason(
    x: Tensor, parameters: list[Tensor], *others: Tensor | None, heads: int, **options: Any
) -> str | None:
    d = parameters[0].shape[0] // heads
    if d > MAX_HEAD_SIZE:
        return f"heads of {d} features are more than {MAX_HEAD_SIZE}"
    return no_kernel_for(x)


@self_attention.forward
def forward(needs_grad, x, parameters, bias, key_mask, seed, *, heads, scale, dropout):
    batch, tokens, width = x.shape
    features = parameters[0].shape[0]
    qkv = linears(x.reshape(batch * tokens, width), parameters[:3], parameters[3:])
    qkv = qkv.view(batch, tokens, 3 * features)
    q, k, v = _parts(qkv, heads)
    any_needed = needs_grad.x or needs_grad.parameters or needs_grad.bias
    out = x.new_empty(batch, tokens, features)
    _, lse, low = attention_forward(
        q, k, v, None, None, bias, key_mask, seed,
        scale=score_scale(scale, features // heads), dropout=dropout, o=_heads(out, heads),
        keep=bool(any_needed),
    )  # fmt: skip
    if not any_needed:
        return out, ()
    return out, (
        x if needs_grad.parameters else None,
        *(parameters[:3] if needs_grad.x else (None, None, None)),
        qkv, bias, key_mask, seed if dropout > 0 else None, None if lse is None else out, lse, low,
    )  # fmt: skip


@self_attention.backward
def backward(
    needs_grad: Any, saved_tensors: Any, dout: Tensor,
    *, heads: int, scale: float | None, dropout: float,
) -> tuple[Any, ...]:  # fmt: skip
    x, *weights, qkv, bias, key_mask, seed, out, lse, low = saved_tensors
    batch, tokens, features = dout.shape
    q, k, v = _parts(qkv, heads)
    do, scale = _heads(dout.contiguous(), heads), score_scale(scale, features // heads)
    dx = dparameters = dbias = None
    if needs_grad.bias:
        dbias = bias_gradient(do, q, k, v, None, None, bias, key_mask, seed, scale, dropout)
    if not (needs_grad.x or needs_grad.parameters):
        return None, None, dbias, None, None
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    attention_backward(
        do, q, k, v, None, None, bias, key_mask, seed, scale=scale, dropout=dropout,
        want_q=True, want_kv=True, want_kv2=False, into=_parts(dqkv, heads),
        kept=(out if out is None else _heads(out, heads), lse, low),
    )  # fmt: skip
    rows = dqkv.view(batch * tokens, 3 * features)
    if needs_grad.x:
        dx = input_gradient(rows, weights)
        dx = dx.view(batch, tokens, dx.shape[1])
    if needs_grad.parameters:
        x = x.reshape(batch * tokens, x.shape[2])
        # The bias of keys adds one number to all scores of a query.
        dparameters = parameter_gradients(rows, x, [features] * 3, needs_grad.parameters, zero=1)
    return dx, dparameters, dbias, None, None


def _parts(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as ``(batch, heads, tokens, d)``, without a copy."""
    batch, tokens, features = qkv.shape
    split = qkv.view(batch, tokens, 3, heads, features // (3 * heads))
    q, k, v = split.permute(2, 0, 3, 1, 4)
    return q, k, v


@self_attention.cost
def cost(x: Tensor, parameters: list[Tensor], *others: Tensor | None, **options: Any) -> Cost:
    batch, tokens, width = x.shape
    features = parameters[0].shape[0]
    projections = 2 * batch * tokens * width * 3 * features
    attention = 4 * batch * tokens * tokens * features
    out = batch * tokens * features * x.element_size()
    moved = nbytes(x, *parameters) + out
    return Cost(
        forward_flops=projections + attention,
        forward_bytes=moved,
        backward_flops=2 * projections + attention * 5 // 2,
        backward_bytes=2 * moved + 3 * out,
    )


@self_attention.inputs(
    smallest=dict(batch=1, tokens=1, width=1, features=1, heads=1),
    usual=dict(batch=3, tokens=5, width=24, features=16, masked=True, heads=2),
    others=[
        dict(batch=2, tokens=33, width=72, features=48, biased=True, heads=3, scale=0.3),
        dict(batch=2, tokens=9, width=24, features=32, heads=2, dropout=0.25),
    ],
    large=dict(batch=5, tokens=2176, width=64, features=70016, heads=1094),
    bench={
        "BLIP-2 Q-Former, 64 images": dict(batch=64, tokens=32, width=768, features=768, heads=12),
        "BLIP-2 Q-Former, 1 image": dict(batch=1, tokens=32, width=768, features=768, heads=12),
        "InstructBLIP, 16 images": dict(
            batch=16, tokens=96, width=768, features=768, masked=True, heads=12
        ),
    },
)
def inputs(
    batch: int, tokens: int, width: int, features: int,
    *, masked: bool = False, biased: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    key_mask = torch.rand(batch, tokens) < 0.7 if masked else None
    if key_mask is not None and batch > 0:
        key_mask[batch // 2] = False
    weights = [torch.randn(features, width) * width**-0.5 for _ in range(3)]
    return (
        torch.randn(batch, tokens, width),
        [*weights, *(torch.randn(features) * 0.1 for _ in range(3))],
        torch.randn(1, 1, tokens, tokens) if biased else None,
        key_mask,
        torch.tensor(20260102),
    )
