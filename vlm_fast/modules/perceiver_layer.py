"""Layers of Perceiver resamplers, whatever a model calls their modules.

Latents attend to the context and to themselves. The two parts of the keys and values are never
concatenated: the attention op takes both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.modules.direct_runs import mlp_part
from vlm_fast.modules.fused_sequence import run_parts

OP = "PerceiverResampler"
KeysValues = tuple[Tensor, Tensor]


class Layer(NamedTuple):
    """The functions and settings of one resampler layer, whatever a model calls them.

    Attributes:
        norm_context, norm_latents: LayerNorm or RMSNorm.
        query, out: linears.
        key_value: one linear for keys and values together, or one for each.
        heads, key_heads: number of heads of queries, and of keys and values.
        scale: factor of the scores.
        feed_forward: the feed-forward network with its norm, as a function.
        head_norms: norms of each head of queries and of keys, or None.
    """

    norm_context: Any
    norm_latents: Any
    query: Any
    key_value: tuple[Any, ...]
    out: Any
    heads: int
    key_heads: int
    scale: float
    feed_forward: Callable[[Tensor], Tensor]
    head_norms: tuple[Any, Any] | None = None


def directly(layer: Layer) -> Layer:
    """A layer whose linears and norms are read instead of called.

    To be called after `why_not_direct_tree` has given None for their root.
    """
    q_norm_and_k_norm = layer.head_norms
    if q_norm_and_k_norm is not None:
        q_norm_and_k_norm = (read_directly(q_norm_and_k_norm[0]), q_norm_and_k_norm[1])
    return layer._replace(
        norm_context=read_directly(layer.norm_context),
        norm_latents=read_directly(layer.norm_latents),
        query=read_directly(layer.query),
        key_value=tuple(map(read_directly, layer.key_value)),
        out=read_directly(layer.out),
        head_norms=q_norm_and_k_norm,
    )


def read_directly(module: Any) -> Any:
    """What an nn.Linear or nn.LayerNorm computes, as a function of its parameters."""
    if type(module) is nn.Linear:
        return functools.partial(F.linear, weight=module.weight, bias=module.bias)
    if type(module) is nn.LayerNorm:
        return functools.partial(
            torch.layer_norm, normalized_shape=module.normalized_shape, weight=module.weight,
            bias=module.bias, eps=module.eps,
        )  # fmt: skip
    return module


def fused_sequence(norm: Any, linear_1: Any, act: Any, linear_2: Any) -> Callable[[Tensor], Tensor]:
    """``linear_2(act(linear_1(norm(x))))`` as a function, which reads their parameters."""
    norm = read_directly(norm)
    parts = (mlp_part((linear_1, act, linear_2), "preactivation"),)
    return lambda x: run_parts(OP, norm(x), parts)


def resample(
    context: Tensor,
    latents: Tensor,
    layers: Sequence[Layer],
    key_mask: Tensor | None = None,
) -> Tensor:
    """Run all layers; returns latents ``(batch, n, dim)``.

    Args:
        context: ``(batch, keys, dim)``.
        latents: ``(n, dim)``.
        layers: their parameters are read directly.
        key_mask: bool ``(batch, keys)``, true where latents attend to the context; None: all.
    """
    batch = context.shape[0]
    if key_mask is not None:  # all latents attend to all latents
        key_mask = torch.cat((key_mask, key_mask.new_ones(batch, len(latents))), 1)
    own = latents.unsqueeze(0)  # shared by all images before the first layer
    for layer in layers:
        own = layer.out(attend(layer, own, context, key_mask)) + own
        own = layer.feed_forward(own) + own
    return own.expand(batch, -1, -1)


def attend(layer: Layer, latents: Tensor, context: Tensor, key_mask: Tensor | None) -> Tensor:
    """Attention of latents ``(batch or 1, n, dim)`` to the context and to themselves.

    The result is ``(batch, n, heads * d)``.
    """
    batch, normed = context.shape[0], layer.norm_latents(latents)
    q = layer.query(normed)
    q = q.view(*q.shape[:2], layer.heads, q.shape[2] // layer.heads)
    if layer.head_norms is not None:
        q = layer.head_norms[0](q)
    (k, v), (k2, v2) = _key_values(layer, layer.norm_context(context), normed)
    q, k2, v2 = (t.expand(batch, -1, -1, -1) for t in (q.transpose(1, 2), k2, v2))
    attended = ops.cross_attention(q, k, v, k2, v2, key_mask=key_mask, scale=layer.scale)
    return attended.transpose(1, 2).flatten(2)


def _key_values(layer: Layer, context: Tensor, latents: Tensor) -> tuple[KeysValues, KeysValues]:
    """Keys and values ``(batch, heads, tokens, d)`` of the normalized context, and of the latents.

    The rows of both are multiplied at once. Two products with one weight would make autograd hold
    three weight gradients at a time, to add two of them.
    """
    rows = torch.cat((context.flatten(0, 1), latents.flatten(0, 1)))
    parts = [linear(rows) for linear in layer.key_value]
    k, v = parts if len(parts) == 2 else parts[0].chunk(2, -1)
    batch, tokens, _ = context.shape
    own, n, _ = latents.shape
    (k, k2), (v, v2) = (x.split_with_sizes((batch * tokens, own * n)) for x in (k, v))
    return _as_heads(layer, batch, tokens, k, v), _as_heads(layer, own, n, k2, v2)


def _as_heads(layer: Layer, batch: int, tokens: int, k: Tensor, v: Tensor) -> KeysValues:
    heads = (batch, tokens, layer.key_heads, k.shape[1] // layer.key_heads)
    k, v = k.view(heads), v.view(heads)
    if layer.head_norms is not None:
        norm = layer.head_norms[1]
        # The bias adds the same number to all scores of a query, which the softmax cancels. Its
        # exact gradient is 0; the sum over both parts of the keys would be rounding error.
        k = F.layer_norm(k, k.shape[-1:], norm.weight, norm.bias * 0, norm.eps)
    return k.transpose(1, 2), v.transpose(1, 2)
