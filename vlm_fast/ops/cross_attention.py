"""Cross-attention of few queries to keys of one or two sources, as in resamplers and Q-Formers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_fast.kernels._cross_attention_aten import bias_gradient
from vlm_fast.kernels._dropout import keep_mask
from vlm_fast.kernels.cross_attention import attention_backward, attention_forward
from vlm_fast.ops.declaration import Cost, linear_op, nbytes, no_kernel_for

MAX_HEAD_SIZE = 128


@linear_op(
    q="floating (batch, heads, queries, d)",
    k="like q (batch, kv_heads, keys, d)",
    v="like q (batch, kv_heads, keys, d)",
    k2="like q (batch, kv_heads, keys2, d) or None",
    v2="like q (batch, kv_heads, keys2, d) or None",
    bias="like q or float32 (1|batch, 1|heads, 1|queries, 1|keys + keys2) or None",
    key_mask="bool (batch, keys + keys2) or None",
    seed="int64 one element or None",
    dropout="number in [0, 1), needs seed",
    where={
        "(k2 is None) == (v2 is None)": "v2: a tensor with k2, and None without",
        "heads % kv_heads == 0 if kv_heads else heads == 0": (
            "k: a number of heads that divides the {heads} heads of q"
        ),
    },
)
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of few queries to keys of one or two sources: ``softmax(scale q k^T + bias) v``.

    Mirrors the attention of transformers' ``Blip2QFormerMultiHeadAttention`` and
    ``Idefics2PerceiverAttention``. The Perceiver's keys, of the image and of the latents (Flamingo,
    arXiv 2204.14198), are never concatenated. Strides are arbitrary; a last stride
    other than 1 costs a copy, a stride of 0 does not. A query that sees no key, or whose scores are
    all -inf, gives zeros. Dtypes other than fp32, fp16 and bf16, and d above 128, fall back.

    Args:
        k: Consecutive heads of q share a head of k and v (arXiv 2305.13245).
        k2: A second source of keys, attended after k and v.
        bias: Added to the scores. Its gradient forms all scores.
        key_mask: True where a key is seen.
        seed: For dropout of probabilities (see `vlm_fast.kernels._dropout`).
        scale: Factor of the scores, ``d ** -0.5`` by default.
        dropout: The probability that an attention probability is zeroed.

    Returns:
        ``(batch, heads, queries, d)``, in memory ``(batch, queries, heads, d)``.
    """
    batch, heads, queries, d = q.shape
    kv_heads = k.shape[1]
    if k2 is not None and v2 is not None:
        k, v = torch.cat([k, k2], 2), torch.cat([v, v2], 2)
    shared = heads // max(kv_heads, 1) * queries
    rows = q.reshape(batch, kv_heads, shared, d)  # queries of all heads that share keys
    scores = torch.matmul(rows, k.transpose(2, 3)) * score_scale(scale, d)
    scores = scores.view(batch, heads, queries, k.shape[2])
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if bias is not None:
        scores = scores + bias
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    p = safe_softmax(scores)
    if dropout > 0 and seed is not None:
        index = [torch.arange(n, device=q.device) for n in (p.shape[3], queries, batch * heads)]
        survives = keep_mask(seed, dropout, index[0], index[1][:, None], index[2][:, None, None])
        p = p * survives.view(*p.shape) / (1 - dropout)
    o = torch.matmul(p.to(q.dtype).view(*rows.shape[:3], k.shape[2]), v)
    return o.view(*q.shape).transpose(1, 2).contiguous().transpose(1, 2)


@cross_attention.fallback_reason
def fallback_reason(q: Tensor, *others: Tensor | None, **options: Any) -> str | None:
    if not 1 <= q.shape[3] <= MAX_HEAD_SIZE:
        return f"head size {q.shape[3]} is not 1 to {MAX_HEAD_SIZE}"
    return no_kernel_for(q)


def safe_softmax(scores: Tensor) -> Tensor:
    """The softmax over the last axis, with zeros instead of NaN where all scores are -inf."""
    if not torch.jit.is_tracing():
        return torch.ops.aten._safe_softmax(scores, -1)
    # torch.onnx does not know _safe_softmax.
    hidden = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(hidden, 0), -1).masked_fill(hidden, 0)


def score_scale(scale: float | None, d: int) -> float:
    """The factor of attention scores: ``scale``, or ``d ** -0.5`` for heads of size d."""
    return max(d, 1) ** -0.5 if scale is None else scale


@cross_attention.forward
def forward(needs_grad, q, k, v, k2, v2, bias, key_mask, seed, *, scale, dropout):
    scale = score_scale(scale, q.shape[3])
    o, lse, low = attention_forward(
        q, k, v, k2, v2, bias, key_mask, seed, scale=scale, dropout=dropout, keep=any(needs_grad)
    )  # fmt: skip
    if not any(needs_grad):
        return o, ()
    kept = None if lse is None else o, lse, low
    return o, (q, k, v, k2, v2, bias, key_mask, seed if dropout > 0 else None, *kept)


@cross_attention.backward
def backward(needs_grad, saved_tensors, do, *, scale, dropout):
    q, k, v, k2, v2, bias, key_mask, seed, *kept = saved_tensors
    scale = score_scale(scale, q.shape[3])
    of_attention = attention_backward(
        do, q, k, v, k2, v2, bias, key_mask, seed, scale=scale, dropout=dropout,
        want_q=needs_grad.q, want_kv=needs_grad.k or needs_grad.v,
        want_kv2=needs_grad.k2 or needs_grad.v2, kept=tuple(kept),
    )  # fmt: skip
    dbias = None
    if needs_grad.bias:
        dbias = bias_gradient(do, q, k, v, k2, v2, bias, key_mask, seed, scale, dropout)
    gradients = (*of_attention, dbias, None, None)
    return tuple(g if need else None for g, need in zip(gradients, needs_grad, strict=True))


@cross_attention.cost
def cost(q, k, v, k2, v2, bias, key_mask, seed, *, scale, dropout):
    keys = k.shape[2] + (0 if k2 is None else k2.shape[2])
    flops = 4 * q.numel() * keys
    sources, masks = nbytes(k, v, k2, v2), nbytes(bias, key_mask)
    # In 16 bits backward reads o's low part and the log-sum-exp of each row too.
    kept = 0 if q.element_size() == 4 else nbytes(q) + 4 * (q.numel() // max(q.shape[3], 1))
    return Cost(
        forward_flops=flops,
        forward_bytes=2 * nbytes(q) + sources + masks,
        backward_flops=5 * flops // 2,
        backward_bytes=4 * nbytes(q) + kept + 2 * sources + masks,
    )


@cross_attention.inputs(
    smallest=dict(batch=1, heads=1, shape=(1, 1), d=1),
    usual=dict(
        batch=2, heads=2, shape=(3, 17), keys2=5, d=24, bias="full", hidden=True, dropout=0.25
    ),
    others=[
        dict(batch=1, heads=2, shape=(32, 257), d=64),
        dict(batch=3, heads=4, kv_heads=2, shape=(5, 19), d=16, hidden=True, blind=1),
        dict(batch=2, heads=2, shape=(7, 33), keys2=7, d=40, bias="keys"),
        dict(batch=1, heads=2, shape=(4, 35), d=80, scale=0.2),
        dict(batch=1, heads=4, kv_heads=1, shape=(9, 40), keys2=9, d=96),
        dict(batch=1, heads=1, shape=(96, 96), d=32),
        dict(batch=1, heads=1, shape=(136, 40), d=16),
    ],
    large=dict(batch=5, heads=16, shape=(64, 107_000), d=64),
    bench={
        "BLIP-2, 64 images": dict(batch=64, heads=12, shape=(32, 257), d=64),
        "BLIP-2, 1 image": dict(batch=1, heads=12, shape=(32, 257), d=64),
        "BLIP-2 at 364 px, 16 images": dict(batch=16, heads=12, shape=(32, 677), d=64),
        "1025 keys, 16 images": dict(batch=16, heads=12, shape=(32, 1025), d=64),
        "InstructBLIP self-attention, 16 images": dict(
            batch=16, heads=12, shape=(96, 96), d=64, hidden=True
        ),
        "Idefics2 perceiver, 8 images": dict(
            batch=8, heads=16, kv_heads=4, shape=(64, 729), keys2=64, d=96, hidden=True
        ),
        "Idefics2 perceiver, 5 x 4900 patches": dict(
            batch=5, heads=16, kv_heads=4, shape=(64, 4900), keys2=64, d=96, hidden=True
        ),
        "MiniCPM-V, 8 images": dict(batch=8, heads=28, shape=(64, 1024), d=128),
        "Flamingo resampler, 8 images": dict(batch=8, heads=8, shape=(64, 256), keys2=64, d=64),
        "ViT-H widths, 8 images": dict(batch=8, heads=16, shape=(32, 257), d=80),
    },
)
def inputs(batch, heads, shape, d, *, kv_heads=None, keys2=0, bias=None, hidden=False, blind=None):
    queries, keys = shape
    kv_heads = kv_heads or heads

    def tokens(n, width):
        return torch.randn(batch, n, width, d).transpose(1, 2)

    q, k, v = tokens(queries, heads), tokens(keys, kv_heads), tokens(keys, kv_heads)
    k2, v2 = (tokens(keys2, kv_heads) if keys2 else None for _ in range(2))
    total = keys + keys2
    if bias is not None:
        full = (batch, heads, queries, total)
        bias = torch.randn(full if bias == "full" else (1, heads, 1, total))
    key_mask = None
    if hidden:
        key_mask = torch.arange(total) % 4 != 1
        key_mask = key_mask.expand(batch, total).clone()
        if blind is not None:
            key_mask[blind] = False
    return q, k, v, k2, v2, bias, key_mask, torch.tensor([20261], dtype=torch.int64)
