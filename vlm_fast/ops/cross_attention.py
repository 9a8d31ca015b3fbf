"""Attention of few queries against the keys of one or two sources: resamplers and Q-Formers."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_fast.kernels._cross_attention_aten import bias_gradient
from vlm_fast.kernels._dropout import keep_mask
from vlm_fast.kernels.cross_attention import attention_backward, attention_forward
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_type, wrong_value
from vlm_fast.ops.declaration import FLOATS, Cost, linear_op, nbytes

MAX_HEAD_SIZE = 128


@linear_op
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
    """``softmax(scale q k^T + bias) v``, of few queries and of keys that may come in two parts.

    Mirrors the attention of transformers' ``Blip2QFormerMultiHeadAttention`` and
    ``Idefics2PerceiverAttention``; the perceiver's keys, of image and of latents, are never
    concatenated (Flamingo, arXiv 2204.14198).

    Args:
        q: ``(batch, heads, queries, d)``; d is at most 128, larger falls back.
        k, v: ``(batch, kv_heads, keys, d)``; ``heads`` is a multiple of ``kv_heads``, and
            consecutive heads share one (arXiv 2305.13245).
        k2, v2: ``(batch, kv_heads, keys2, d)``, attended after k and v, or None.
        bias: ``(batch, heads, queries, keys + keys2)``, any size 1, added to the scores; of q's
            dtype or fp32. With a gradient, that of all scores is formed.
        key_mask: bool ``(batch, keys + keys2)``, True where a key is seen.
        seed: one int64, for ``dropout`` (see `vlm_fast.kernels._dropout`).
        scale: of the scores, ``d ** -0.5`` by default.
        dropout: of probabilities, in [0, 1).

    All floating, of one dtype (fp32, fp16 or bf16; others fall back) and one device, with any
    strides: those of 0 are read as they are, a last one other than 1 costs a copy. A query that
    sees no key, or whose scores are all -Inf, gives zeros.

    Returns ``(batch, heads, queries, d)``, in memory ``(batch, queries, heads, d)``.

    Raises:
        TypeError: an argument is no tensor, of another dtype, or missing (v2, seed).
        ValueError: shapes do not fit, devices differ, or dropout is not in [0, 1).
    """
    batch, heads, queries, d = q.shape
    kv_heads = k.shape[1]
    if k2 is not None and v2 is not None:
        k, v = torch.cat([k, k2], 2), torch.cat([v, v2], 2)
    shared = heads // max(kv_heads, 1) * queries
    rows = q.reshape(batch, kv_heads, shared, d)  # of heads that share keys
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
        p = p * survives.view(p.shape) / (1 - dropout)
    o = torch.matmul(p.to(q.dtype).view(*rows.shape[:3], k.shape[2]), v)
    return o.view(q.shape).transpose(1, 2).contiguous().transpose(1, 2)


@cross_attention.accepts
def accepts(q, k, v, k2, v2, bias, key_mask, seed, *, scale, dropout):
    # One pass over the usual case; what is wrong is found out afterwards.
    try:
        dtype, device = q.dtype, q.device
        batch, heads, _, d = q.shape
        images, kv_heads, _, d_k = k.shape
        if (
            batch == images
            and d == d_k
            and heads % kv_heads == 0
            and v.shape == k.shape
            and k.dtype is dtype
            and v.dtype is dtype
            and k.device == device
            and v.device == device
            and dtype.is_floating_point
            and 0 <= dropout < 1
            and k2 is v2 is bias is key_mask is seed is None
            and dropout == 0
        ):
            return q, k, v, k2, v2, bias, key_mask, seed
    except (AttributeError, ValueError, TypeError, ZeroDivisionError):
        pass
    mistake = _mistake(q, k, v, k2, v2, bias, key_mask, seed, dropout)
    if mistake is not None:
        raise mistake
    return q, k, v, k2, v2, bias, key_mask, seed


def _mistake(q, k, v, k2, v2, bias, key_mask, seed, dropout):
    name = "cross_attention"
    optional = dict(k2=k2, v2=v2, bias=bias, key_mask=key_mask, seed=seed)
    named = dict(q=q, k=k, v=v, **optional)
    for argument, value in named.items():
        if not isinstance(value, Tensor) and not (value is None and argument in optional):
            return not_a_tensor(name, argument, value)
    if not isinstance(dropout, (int, float)):
        return wrong_type(name, "dropout", dropout, "a number in [0, 1)")
    if not 0 <= dropout < 1:
        return wrong_value(name, "dropout", dropout, "a number in [0, 1)")
    if (k2 is None) != (v2 is None):
        missing = "k2" if k2 is None else "v2"
        return wrong_type(name, missing, None, "a Tensor, or neither k2 nor v2")
    if seed is None and dropout > 0:
        return wrong_type(name, "seed", seed, "one int64, which dropout needs")
    for argument, value in named.items():
        if value is not None and argument not in ("key_mask", "seed") and value.ndim != 4:
            return wrong_value(name, argument, value, "four dimensions, (batch, heads, tokens, d)")
    batch, heads, queries, d = q.shape
    keys = k.shape[2]
    if k.shape != (batch, k.shape[1], keys, d):
        return wrong_value(name, "k", k, f"({batch}, kv_heads, keys, {d}) to match q")
    kv_heads = k.shape[1]
    if heads % kv_heads if kv_heads else heads:
        return wrong_value(name, "k", k, f"(*, a divisor of the {heads} heads of q, *, *)")
    if v.shape != k.shape:
        return wrong_value(name, "v", v, f"{tuple(k.shape)} as k has")
    if k2 is not None:
        if k2.shape != (batch, kv_heads, k2.shape[2], d):
            return wrong_value(name, "k2", k2, f"({batch}, {kv_heads}, keys2, {d}) to match k")
        if v2.shape != k2.shape:
            return wrong_value(name, "v2", v2, f"{tuple(k2.shape)} as k2 has")
        keys = keys + k2.shape[2]
    if bias is not None:
        scores = (batch, heads, queries, keys)
        if any(n not in (1, m) for n, m in zip(bias.shape, scores, strict=True)):
            return wrong_value(name, "bias", bias, f"{scores}, or 1 in place of any size")
    if key_mask is not None and key_mask.shape != (batch, keys):
        return wrong_value(name, "key_mask", key_mask, f"({batch}, {keys}), one for each key")
    if seed is not None and seed.shape not in ((), (1,)):
        return wrong_value(name, "seed", seed, "one int64")
    if not q.is_floating_point():
        return wrong_type(name, "q", q, "a floating dtype (float32, bfloat16 or float16)")
    for argument in ("k", "v", "k2", "v2"):
        value = named[argument]
        if value is not None and value.dtype != q.dtype:
            return wrong_type(name, argument, value, f"{q.dtype} as q has")
    if bias is not None and bias.dtype not in (q.dtype, torch.float32):
        return wrong_type(name, "bias", bias, f"{q.dtype} as q has, or torch.float32")
    if key_mask is not None and key_mask.dtype != torch.bool:
        return wrong_type(name, "key_mask", key_mask, "torch.bool")
    if seed is not None and seed.dtype != torch.int64:
        return wrong_type(name, "seed", seed, "torch.int64")
    for argument, value in named.items():
        if value is not None and value.device != q.device:
            return wrong_value(name, argument, value, f"{q.device}, where q is")
    return None


@cross_attention.requires
def requires(q, k, v, k2, v2, bias, key_mask, seed, *, scale, dropout):
    if q.dtype not in FLOATS:
        return f"{q.dtype} has no kernels here (float32, bfloat16 and float16 have)"
    if not 1 <= q.shape[3] <= MAX_HEAD_SIZE:
        return f"head size {q.shape[3]} is not 1 to {MAX_HEAD_SIZE} (no more is tiled)"
    return None


def safe_softmax(scores: Tensor) -> Tensor:
    """The softmax over keys; zeros where all scores are -Inf."""
    if not torch.jit.is_tracing():
        return torch.ops.aten._safe_softmax(scores, -1)
    # The same in operators that torch.onnx knows.
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(blind, 0), -1).masked_fill(blind, 0)


def score_scale(scale: float | None, d: int) -> float:
    """What scores are multiplied by, of heads of size d."""
    return max(d, 1) ** -0.5 if scale is None else scale


@cross_attention.forward
def forward(needs, q, k, v, k2, v2, bias, key_mask, seed, *, scale, dropout):
    scale = score_scale(scale, q.shape[3])
    o = attention_forward(
        q, k, v, k2, v2, bias, key_mask, seed, scale=scale, dropout=dropout
    )  # fmt: skip
    if not any(needs):
        return o, ()
    # Inputs alone: what the forward found of the scores is found again.
    return o, (q, k, v, k2, v2, bias, key_mask, seed if dropout > 0 else None)


@cross_attention.backward
def backward(needs, kept, do, *, scale, dropout):
    q, k, v, k2, v2, bias, key_mask, seed = kept
    scale = score_scale(scale, q.shape[3])
    found = attention_backward(
        do, q, k, v, k2, v2, bias, key_mask, seed, scale=scale, dropout=dropout,
        want_q=needs.q, want_kv=needs.k or needs.v, want_kv2=needs.k2 or needs.v2,
    )  # fmt: skip
    dbias = None
    if needs.bias:
        dbias = bias_gradient(
            do, q, k, v, k2, v2, bias, key_mask, seed, scale, dropout
        )  # fmt: skip
    gradients = (*found, dbias, None, None)
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


@cross_attention.cost
def cost(q, k, v, k2, v2, bias, key_mask, seed, *, scale, dropout):
    keys = k.shape[2] + (0 if k2 is None else k2.shape[2])
    flops = 4 * q.numel() * keys
    sources, beside = nbytes(k, v, k2, v2), nbytes(bias, key_mask)
    return Cost(
        forward_flops=flops,
        forward_bytes=2 * nbytes(q) + sources + beside,
        backward_flops=5 * flops // 2,
        backward_bytes=4 * nbytes(q) + 2 * sources + beside,
    )


@cross_attention.inputs(
    test=[
        dict(batch=1, heads=1, shape=(1, 1), d=1),
        dict(
            batch=2, heads=2, shape=(3, 17), keys2=5, d=24, bias="full", hidden=True, dropout=0.25
        ),
        dict(batch=1, heads=2, shape=(32, 257), d=64),
        dict(batch=3, heads=4, kv_heads=2, shape=(5, 19), d=16, hidden=True, blind=1),
        dict(batch=2, heads=2, shape=(7, 33), keys2=7, d=40, bias="keys"),
        dict(batch=1, heads=2, shape=(4, 35), d=80, scale=0.2),
        dict(batch=1, heads=4, kv_heads=1, shape=(9, 40), keys2=9, d=96),
        dict(batch=1, heads=1, shape=(96, 96), d=32),
    ],
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
