"""Plain PyTorch summing in other orders, to know the size of its rounding and not one draw of it.

Attention whose scores are in the thousands is all but a choice of one key; what is left of the
other keys carries the rounding of their scores whole, and its largest error hangs on a few rows.
Plain PyTorch with its features permuted is then beyond three times plain PyTorch's error in a
tenth to a third of all draws: one draw is no yardstick. The largest of several orders is. So it is
for the gradient of a gate, one sum over all rows and features that may all but cancel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlm_fast import ops
from vlm_fast.kernels._dropout import keep_mask
from vlm_fast.op import Op

ORDERS = 8


def in_other_orders(op: Op[..., Any]) -> list[Callable[..., Tensor]]:
    """Functions equal to the op's reference but for the order of their sums."""
    permuted = {
        "cross_attention": [_cross_attention],
        "gated_add": [_gated_add],
        "gated_add_norm": [_gated_add],
        "media_cross_attention": [_media_cross_attention],
        "self_attention": [_self_attention],
        "absorbed_cross_attention": [
            functools.partial(_absorbed, plain)
            for plain in ops.absorbed_cross_attention.plain_orders
        ],
    }.get(op.name, [])
    return [functools.partial(f, order) for f in permuted for order in range(ORDERS)]


class ExactSoftmaxBackward(TorchDispatchMode):
    """Softmax's backward without the cancellation at the largest probability.

    ``p (dp - sum(p dp))`` there is the sum of all other keys' gradients; where these are below one
    ulp of dp, it comes out as 0, in float64 too. That is no truth to be measured against.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._softmax_backward_data.default:
            dp, p, dim = args[:3]
            dp = dp - dp.gather(dim, p.argmax(dim, keepdim=True)).nan_to_num(0, 0, 0)
            args = (dp, p, *args[2:])
        return function(*args, **(kwargs or {}))


def _permutation(order: int, n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(order))


def _cross_attention(
    order, q, k, v, k2=None, v2=None, bias=None, key_mask=None, seed=None, *,
    scale=None, dropout=0.0,
):  # fmt: skip
    if k2 is not None:
        k, v = torch.cat([k, k2], 2), torch.cat([v, v2], 2)
    batch, heads, queries, d = q.shape
    i, j = _permutation(order, d), _permutation(order, k.shape[2])
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k[:, :, j][..., i], v[:, :, j]))
    scores = (q[..., i] @ k.transpose(2, 3) * (d**-0.5 if scale is None else scale)).float()
    if bias is not None:
        scores = scores + (bias if bias.shape[3] == 1 else bias[..., j])
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, j], -torch.inf)
    p = torch.ops.aten._safe_softmax(scores, -1)
    if dropout > 0:
        at = [torch.arange(n, device=q.device) for n in (batch * heads, queries)]
        survives = keep_mask(seed, dropout, j.to(q.device), at[1][:, None], at[0][:, None, None])
        p = p * survives.view(p.shape) / (1 - dropout)
    return p.to(q.dtype) @ v


def _media_cross_attention(
    order, q, k, v, media_index, q_norm=None, *, tokens_per_media, **options
):  # fmt: skip
    def permuted(x):  # the features, and the keys within each medium
        i, j = _permutation(order, q.shape[3]), _permutation(order, tokens_per_media)
        x = x.unflatten(2, (-1, tokens_per_media))[:, :, :, j]
        return x.flatten(2, 3), x.flatten(2, 3)[..., i]

    options |= dict(tokens_per_media=tokens_per_media)
    options["scale"] = options.get("scale") or q.shape[3] ** -0.5
    i = _permutation(order, q.shape[3])
    reference = ops.media_cross_attention.reference
    q_norm = q_norm if q_norm is None else q_norm[i]
    return reference(q[..., i], permuted(k)[1], permuted(v)[0], media_index, q_norm, **options)


def _gated_add(order, x, y, gate, *others, **options):
    """Of permuted features: the gate's gradient is one sum over all of them, mostly cancelling."""
    i = _permutation(order, x.shape[-1])
    per_feature = [
        t if t is None or t.shape[-1:] != x.shape[-1:] or t.dtype == torch.bool else t[..., i]
        for t in (gate, *others)
    ]
    op = ops.gated_add_norm if len(others) > 1 else ops.gated_add
    found = op.reference(x[..., i], y[..., i], *per_feature, **options)
    if isinstance(found, tuple):
        return tuple(t[..., i.argsort()] for t in found)
    return found[..., i.argsort()]


def _self_attention(
    order, x, parameters, bias=None, key_mask=None, seed=None, *, heads, **options
):  # fmt: skip
    i = _permutation(order, x.shape[2])
    q, k, v = (
        torch.nn.functional.linear(x[..., i], w[:, i], b).unflatten(2, (heads, -1)).transpose(1, 2)
        for w, b in zip(parameters[:3], parameters[3:], strict=True)
    )
    o = _cross_attention(order, q, k, v, None, None, bias, key_mask, seed, **options)
    return o.transpose(1, 2).flatten(2)


def _absorbed(plain, order, q, x, weight_k, bias_k, weight_v, *others, heads, **options):
    i, j = _permutation(order, x.shape[2]), _within_heads(order, len(weight_k), heads)
    return plain(
        q[..., j], x[..., i], weight_k[j][:, i], None if bias_k is None else bias_k[j],
        weight_v[:, i], *others, heads=heads, **options,
    )  # fmt: skip


def _within_heads(order: int, features: int, heads: int) -> Tensor:
    d = features // heads
    return (torch.arange(heads)[:, None] * d + _permutation(order, d)).flatten()
