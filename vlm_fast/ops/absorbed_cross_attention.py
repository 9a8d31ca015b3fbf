"""Attention against raw features, without forming keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_fast.kernels._launcher import dense
from vlm_fast.kernels.absorbed_cross_attention import (
    absorbed_attention,
    absorbed_attention_backward,
    after_dropout,
    value_weights,
)
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_type, wrong_value
from vlm_fast.ops.cross_attention import cross_attention, score_scale
from vlm_fast.ops.declaration import FLOATS, Cost, linear_op, nbytes

MAX_KEYS = 4096  # of one row of scores, which a program holds whole: with more, it spills


@linear_op
def absorbed_cross_attention(
    q: Tensor,
    x: Tensor,
    weight_k: Tensor,
    bias_k: Tensor | None,
    weight_v: Tensor,
    bias_v: Tensor | None,
    key_mask: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    heads: int,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """``cross_attention(q, linear(x, weight_k, bias_k), linear(x, weight_v, bias_v))``.

    Computed as ``softmax(scale (q W_k) x^T) x W_v^T + b_v``: the key bias shifts all scores of a
    query alike and drops out; the value bias adds once. Fewer FLOPs wherever a head has fewer
    queries than ``d`` (`absorbs` says when), and neither K nor V exists. Mirrors the attention to
    the image in transformers' ``Blip2QFormerMultiHeadAttention``, after its query projection.

    Scores carry the rounding of ``|q W_k| |x|`` where formed keys carry that of ``|q| |k|``: the
    same size but where keys cancel, and felt only by scores so large that one key has all weight.

    Args:
        q: ``(batch, queries, heads * d)``, projected queries; a stride of 0 over the batch is fine.
        x: ``(batch, keys, width)``, raw features.
        weight_k, weight_v: ``(heads * d, width)``.
        bias_k, bias_v: ``(heads * d,)`` or None. The gradient of ``bias_k`` is zero, whatever the
            values.
        key_mask: bool ``(batch, keys)``, True where a key is seen; a query that sees none gives 0.
        seed: one int64, for dropout of probabilities (see `vlm_fast.kernels._dropout`).
        heads: how many heads ``q`` holds.
        scale: of the scores, ``d ** -0.5`` by default.
        dropout: probability in [0, 1).

    All floating, of one dtype (fp32, fp16 or bf16; others fall back) and one device. Returns
    ``(batch, queries, heads * d)``.

    Raises:
        TypeError: an argument is no tensor, not floating, or of another dtype than q.
        ValueError: shapes do not fit, devices differ, dropout without a seed or not in [0, 1).
    """
    batch, queries, features = q.shape
    d = features // heads
    split = (batch, x.shape[1], heads, d)
    k = torch.nn.functional.linear(x, weight_k, bias_k).view(split).transpose(1, 2)
    v = torch.nn.functional.linear(x, weight_v, bias_v).view(split).transpose(1, 2)
    attended = cross_attention.reference(
        q.reshape(batch, queries, heads, d).transpose(1, 2), k, v, None, None, None, key_mask, seed,
        scale=scale, dropout=dropout,
    )  # fmt: skip
    return attended.transpose(1, 2).reshape(q.shape)


@absorbed_cross_attention.rounds_like
def absorbed(
    q, x, weight_k, bias_k, weight_v, bias_v, key_mask, seed, *, heads, scale=None, dropout=0.0
):  # fmt: skip
    """The queries first multiplied by the key weights, as documented."""
    batch, queries, features = q.shape
    d = features // heads
    split = q.view(batch, queries, heads, d).transpose(1, 2)
    wide = split @ weight_k.view(heads, d, -1) * score_scale(scale, d)
    scores = wide @ x[:, None].transpose(2, 3)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    p = torch.ops.aten._safe_softmax(scores, -1)
    if dropout > 0:
        p = after_dropout(p.flatten(1, 2), seed, heads, dropout).view(p.shape)
    out = (p @ x[:, None]) @ weight_v.view(heads, d, -1).transpose(1, 2)
    if bias_v is not None:
        out = out + p.sum(-1, keepdim=True) * bias_v.view(heads, 1, d)
    if bias_k is not None:
        out = out + 0 * bias_k.sum()
    return out.transpose(1, 2).reshape(q.shape)


def absorbs(queries: int, keys: int, width: int, d: int, batch: int, *, on_gpu: bool) -> bool:
    """Whether absorbing pays: a function of shapes, the same on every rank.

    FLOPs of one image and head: ``4 queries (keys + d) width`` against ``4 keys d (width +
    queries)``. Not on a GPU: there, products are cheap, and queries as wide as the features and
    four launches more take longer than they save (see the results of an H200).
    """
    fewer = queries * (keys + d) * width < keys * d * (width + queries)
    return not on_gpu and fewer and keys <= MAX_KEYS


@absorbed_cross_attention.accepts
def accepts(
    q, x, weight_k, bias_k, weight_v, bias_v, key_mask, seed, *, heads, scale, dropout
):  # fmt: skip
    try:
        dtype, device = q.dtype, q.device
        batch, _, features = q.shape
        images, keys, width = x.shape
        if (
            batch == images
            and heads > 0
            and features % heads == 0
            and weight_k.shape == weight_v.shape == (features, width)
            and x.dtype is weight_k.dtype is weight_v.dtype is dtype
            and x.device == weight_k.device == weight_v.device == device
            and dtype.is_floating_point
            and (bias_k is None or _fits(bias_k, features, dtype, device))
            and (bias_v is None or _fits(bias_v, features, dtype, device))
            and (
                key_mask is None
                or (
                    key_mask.shape == (batch, keys)
                    and key_mask.dtype is torch.bool
                    and key_mask.device == device
                )
            )
            and 0 <= dropout < 1
            and (dropout == 0 or (seed.dtype is torch.int64 and seed.numel() == 1))
        ):
            return q, x, weight_k, bias_k, weight_v, bias_v, key_mask, seed
    except (AttributeError, ValueError, TypeError):
        pass
    raise _mistake(q, x, weight_k, bias_k, weight_v, bias_v, key_mask, seed, heads, dropout)


def _fits(bias, features, dtype, device):
    return bias.shape == (features,) and bias.dtype is dtype and bias.device == device


def _mistake(q, x, weight_k, bias_k, weight_v, bias_v, key_mask, seed, heads, dropout):
    op = "absorbed_cross_attention"
    optional = dict(bias_k=bias_k, bias_v=bias_v, key_mask=key_mask, seed=seed)
    named = dict(q=q, x=x, weight_k=weight_k, weight_v=weight_v, **optional)
    for name, value in named.items():
        if not isinstance(value, Tensor) and not (value is None and name in optional):
            return not_a_tensor(op, name, value)
    for name in ("q", "x"):
        if named[name].ndim != 3:
            return wrong_value(op, name, named[name], "three dimensions, (batch, tokens, features)")
    batch, _, features = q.shape
    if type(heads) is not int or heads < 1 or features % heads:
        return wrong_value(op, "heads", heads, f"a divisor of {features}, the width of q")
    if x.shape[0] != batch:
        return wrong_value(op, "x", x, f"({batch}, keys, width): as many images as q")
    for name in ("weight_k", "weight_v"):
        wanted = (features, x.shape[2])
        if named[name].shape != wanted:
            return wrong_value(op, name, named[name], f"{wanted} to match q and x")
    for name in ("bias_k", "bias_v"):
        if named[name] is not None and named[name].shape != (features,):
            return wrong_value(op, name, named[name], f"({features},) or None")
    if key_mask is not None and key_mask.shape != (batch, x.shape[1]):
        return wrong_value(op, "key_mask", key_mask, f"({batch}, {x.shape[1]}) or None")
    if key_mask is not None and key_mask.dtype is not torch.bool:
        return wrong_type(op, "key_mask", key_mask, "torch.bool")
    if not 0 <= dropout < 1:
        return wrong_value(op, "dropout", dropout, "a probability in [0, 1)")
    if dropout > 0 and (seed is None or seed.dtype is not torch.int64 or seed.numel() != 1):
        return wrong_value(op, "seed", seed, "one int64, as dropout needs")
    if not q.is_floating_point():
        return wrong_type(op, "q", q, "a floating dtype (float32, bfloat16 or float16)")
    for name, value in named.items():
        if value is None or name in ("key_mask", "seed"):
            continue
        if value.dtype != q.dtype:
            return wrong_type(op, name, value, f"{q.dtype} as q has")
    for name, value in named.items():
        if value is not None and value.device != q.device:
            return wrong_value(op, name, value, f"{q.device}, where q is")
    return wrong_type(op, "arguments", named, "dense tensors")


@absorbed_cross_attention.requires
def requires(q, x, weight_k, bias_k, weight_v, bias_v, key_mask, seed, *, heads, scale, dropout):
    if q.dtype not in FLOATS:
        return f"{q.dtype} has no kernels here (float32, bfloat16 and float16 have)"
    if x.shape[2] == 0:
        return "features of width 0, of which the value bias is all that is attended to"
    if x.shape[1] > MAX_KEYS:
        return f"{x.shape[1]} keys are more than {MAX_KEYS}; cross_attention takes any number"
    return None


@absorbed_cross_attention.forward
def forward(
    needs, q, x, weight_k, bias_k, weight_v, bias_v, key_mask, seed, *, heads, scale, dropout
):
    if q.numel() == 0 or x.numel() == 0:
        out, p = q.new_zeros(q.shape), q.new_zeros(q.shape[0], heads * q.shape[1], x.shape[1])
    else:
        out, p = absorbed_attention(
            _split(q, heads), dense(x), _split_weight(weight_k, heads),
            _split_weight(weight_v, heads), None if bias_v is None else bias_v.contiguous(),
            key_mask, seed, scale=score_scale(scale, q.shape[2] // heads), dropout=dropout,
        )  # fmt: skip
        out = out.view(q.shape)
    inner = needs.q or needs.x or needs.weight_k
    weighs = inner or needs.weight_v or needs.bias_v
    return out, (
        q if needs.x or needs.weight_k else None,
        x if inner or needs.weight_v else None,
        weight_k if needs.q or needs.x else None,
        weight_v if inner else None,
        bias_v if inner and dropout > 0 else None,
        seed if weighs and dropout > 0 else None,
        p if weighs else None,
    )


@absorbed_cross_attention.backward
def backward(needs, kept, dout, *, heads, scale, dropout):
    q, x, weight_k, weight_v, bias_v, seed, p = kept
    batch, queries, features = dout.shape
    empty = p is not None and (p.numel() == 0 or features == 0)
    dout = _split(dout, heads)
    dq = dx = dweight_k = dweight_v = dbias_k = dbias_v = None
    if empty:
        return tuple(
            torch.zeros(shape, dtype=dout.dtype, device=dout.device) if need else None
            for need, shape in zip(needs, _shapes(x, batch, queries, features), strict=True)
        )
    if needs.q or needs.x or needs.weight_k or needs.weight_v:
        dq, dx, dweight_k, dweight_v = absorbed_attention_backward(
            dout, p, dout if q is None else _split(q, heads), dense(x),
            weight_k if weight_k is None else _split_weight(weight_k, heads),
            weight_v if weight_v is None else _split_weight(weight_v, heads),
            bias_v, seed, scale=score_scale(scale, features // heads), dropout=dropout,
            want_q=needs.q, want_x=needs.x, want_k=needs.weight_k, want_v=needs.weight_v,
        )  # fmt: skip
        dq = None if dq is None else dq.view(batch, queries, features)
        dweight_k = None if dweight_k is None else dweight_k.view(features, -1)
        dweight_v = None if dweight_v is None else dweight_v.view(features, -1)
    if needs.bias_v:  # it counts as often as probabilities sum to 1: not where no key is seen
        total = value_weights(p, seed, heads, dropout).sum(-1, dtype=torch.float32)
        total = total.view(batch, heads, queries).transpose(1, 2)
        dbias_v = (dout * total.unsqueeze(-1)).sum((0, 1)).to(dout.dtype).view(features)
    if needs.bias_k:
        dbias_k = dout.new_zeros(features)
    return dq, dx, dweight_k, dbias_k, dweight_v, dbias_v, None, None


def _shapes(x: Tensor | None, batch: int, queries: int, features: int) -> tuple[Any, ...]:
    """Of the arguments, as far as gradients can be wanted."""
    rows: tuple[int, ...] = () if x is None else tuple(x.shape)
    weight = (features, *rows[2:])
    return (batch, queries, features), rows, weight, (features,), weight, (features,), (), ()


def _split(x: Tensor, heads: int) -> Tensor:
    batch, tokens, features = x.shape
    return dense(x).view(batch, tokens, heads, features // heads)


def _split_weight(weight: Tensor, heads: int) -> Tensor:
    features, width = weight.shape
    return weight.contiguous().view(heads, features // heads, width)


@absorbed_cross_attention.cost
def cost(q, x, weight_k, bias_k, weight_v, bias_v, key_mask, seed, *, heads, scale, dropout):
    batch, queries, features = q.shape
    keys, width = x.shape[1:]
    products = 2 * batch * queries * heads * keys * width  # with x, each
    projections = 2 * batch * queries * features * width  # with a weight, each
    moved = nbytes(x, weight_k, weight_v) + 2 * q.numel() * q.element_size()
    return Cost(
        forward_flops=2 * (products + projections),
        forward_bytes=moved,
        backward_flops=3 * products + 4 * projections,
        backward_bytes=2 * moved,
    )


@absorbed_cross_attention.inputs(
    test=[
        dict(batch=1, queries=1, keys=1, width=1, features=1, heads=1),
        dict(batch=3, queries=5, keys=17, width=24, features=16, masked=True, heads=2),
        dict(batch=2, queries=3, keys=65, width=72, features=48, heads=3, scale=0.3),
        dict(batch=2, queries=32, keys=257, width=40, features=128, heads=2),
        dict(batch=2, queries=4, keys=33, width=24, features=32, heads=2, dropout=0.25),
        dict(batch=2, queries=4, keys=9, width=24, features=32, bias=False, heads=2),
    ],
    bench={
        "BLIP-2, 64 images": dict(
            batch=64, queries=32, keys=257, width=1408, features=768, heads=12
        ),
        "BLIP-2 with ViT-L, 64 images": dict(
            batch=64, queries=32, keys=257, width=1024, features=768, heads=12
        ),
        "BLIP-2 at 364 px, 16 images": dict(
            batch=16, queries=32, keys=677, width=1408, features=768, heads=12
        ),
        "1025 keys, 16 images": dict(
            batch=16, queries=32, keys=1025, width=1408, features=768, heads=12
        ),
        "BLIP-2, 1 image": dict(batch=1, queries=32, keys=257, width=1408, features=768, heads=12),
        "most keys, dropout, 4 images": dict(
            batch=4, queries=32, keys=MAX_KEYS, width=1408, features=768, heads=12, dropout=0.1
        ),
    },
)
def inputs(batch, queries, keys, width, features, *, masked=False, bias=True):
    key_mask = torch.rand(batch, keys) < 0.7 if masked else None
    if key_mask is not None and batch > 0:
        key_mask[batch // 2] = False  # an image of which nothing is seen
    return (
        torch.randn(batch, queries, features),
        torch.randn(batch, keys, width),
        torch.randn(features, width) * width**-0.5,
        torch.randn(features) * 0.1 if bias else None,
        torch.randn(features, width) * width**-0.5,
        torch.randn(features) * 0.1 if bias else None,
        key_mask,
        torch.tensor(20260101),
    )
