"""A whole layer of a Q-Former as one node of the autograd graph."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels._activation import ACTIVATIONS
from vlm_fast.kernels.mlp import activate
from vlm_fast.ops.add_layer_norm import MAX_FEATURES, add_layer_norm
from vlm_fast.ops.cross_attention import MAX_HEAD_SIZE, cross_attention, score_scale
from vlm_fast.ops.declaration import no_kernel_for, op
from vlm_fast.ops.qformer_layer_parameters import check, split
from vlm_fast.ops.qformer_layer_passes import backward, forward
from vlm_fast.ops.qformer_layer_samples import SHAPES, cost, inputs
from vlm_fast.ops.self_attention import self_attention


@op(
    hidden="floating (batch, tokens, features)",
    image_kv="like hidden (images, keys, 2 * features) or None",
    parameters="list of like hidden",
    bias="floating (1|batch, 1|heads, 1|tokens, 1|tokens) or None",
    key_mask="bool (batch, tokens) or None",
    image_mask="bool (images, keys) or None",
    seeds="int64 (6) or None",
    heads="int from 1",
    text="int from 0",
    activation=ACTIVATIONS,
    dropout="number in [0, 1), needs seeds",
    attention_dropout="number in [0, 1), needs seeds",
    where={
        "tokens > 0 and features > 0": "hidden: at least one token and one feature",
        "text <= tokens": "text: a number of tokens, at most {tokens}",
        "features % heads == 0": "heads: a divisor of the {features} features",
        "image_kv is None or batch == 1 or (batch % images if images else batch) == 0": (
            "image_kv: as many images as sequences ({batch}), a divisor of that, or one sequence"
        ),
        "image_kv is None or text < tokens": "image_kv: None, without query tokens",
        "image_kv is None or text == 0 or batch == images or batch > 1": (
            "image_kv: one image for one sequence with text ({images} images)"
        ),
    },
)
def qformer_layer(
    hidden: Tensor,
    image_kv: Tensor | None,
    parameters: list[Tensor],
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    seeds: Tensor | None = None,
    *,
    heads: int,
    text: int = 0,
    scale: float | None = None,
    eps: float = 1e-12,
    activation: str = "gelu",
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
) -> Tensor:
    """One layer of a Q-Former: self-attention, cross-attention of the queries, and MLPs.

    Mirrors transformers' ``Blip2QFormerLayer`` and ``InstructBlipQFormerLayer`` (BLIP-2, arXiv
    2301.12597): query tokens come first, then text tokens, which have an MLP of their own. Each
    block ends with ``LayerNorm(dropout(dense(...)) + input)``. It computes what `self_attention`,
    `cross_attention`, `mlp` and `add_layer_norm` do, with less work for the host. Dtypes other than
    fp32, fp16 and bf16, heads of more than 128 features and more than 8192 features fall back.

    Args:
        image_kv: Keys, then values, of the image, already projected; None for a layer without
            cross-attention. One sequence, without text, is shared by all images; several
            sequences of an image are consecutive.
        parameters: Of the self-attention the weights of queries, keys and values, their biases,
            weight and bias of the dense layer, weight and bias of the norm. With an image, of the
            cross-attention weight and bias of the queries, of the dense layer and of the norm. Of
            the queries' MLP, if there are queries, weight and bias of both linears and of the norm;
            then of the text's, if there is text.
        bias: Added to the scores of the self-attention. Its gradient forms all scores.
        key_mask: True where a token is seen.
        image_mask: True where a key of the image is seen.
        seeds: For dropout of the self-attention's probabilities and output, of the
            cross-attention's, and of the MLPs' outputs (see `vlm_fast.kernels._dropout`).
        heads: The number of heads that the features are split into.
        text: The number of text tokens, which are the last ones.
        scale: Factor of the scores, ``(features / heads) ** -0.5`` by default.
        eps: Added to the variances of the norms.
        dropout: The probability that an element of a block's output is zeroed.
        attention_dropout: The probability that an attention probability is zeroed.

    Returns:
        ``(batch, tokens, features)``, or ``(images, tokens, features)`` of a shared sequence.
    """
    seed = [None] * 6 if seeds is None else list(seeds)
    queries = hidden.shape[1] - text
    first, cross, *mlps = split(parameters, image_kv is not None, queries > 0)
    scale = score_scale(scale, hidden.shape[2] // heads)
    options: dict[str, Any] = dict(scale=scale, dropout=attention_dropout)
    attend: Any = cross_attention.reference

    def normed(x: Tensor, residual: Tensor, tail: list[Tensor], seed: Tensor | None) -> Tensor:
        weight, x_bias, *norm = tail
        x = F.linear(x, weight)
        return add_layer_norm.reference(
            x, residual, norm[0], norm[1], x_bias, seed, eps=eps, dropout=dropout
        )

    x = self_attention.reference(hidden, first[:6], bias, key_mask, seed[0], heads=heads, **options)
    x = normed(x, hidden, first[6:], seed[1])
    x, words = x.split((queries, text), 1) if text else (x, x[:, :0])
    if image_kv is not None:
        q, images = F.linear(x, cross[0], cross[1]), image_kv.shape[0]
        if x.shape[0] == 1 and images != 1:
            x, q = x.expand(images, -1, -1), q.expand(images, -1, -1)
        rows = x.shape[0] // max(images, 1) * x.shape[1]
        k, v = image_kv.chunk(2, 2)
        by_head = [
            t.reshape(images, n, heads, x.shape[2] // heads).transpose(1, 2)
            for t, n in ((q, rows), (k, k.shape[1]), (v, k.shape[1]))
        ]
        o = attend(*by_head, None, None, None, image_mask, seed[2], **options)
        x = normed(o.transpose(1, 2).reshape(x.shape), x, cross[2:], seed[3])
    found = [
        normed(activate(F.linear(x, mlp[0], mlp[1]), activation), x, mlp[2:], seed)
        for x, mlp, seed in zip((x, words), mlps, seed[4:], strict=True)
        if mlp
    ]
    return torch.cat(found, 1) if len(found) > 1 else found[0]


@qformer_layer.fallback_reason
def fallback_reason(hidden: Tensor, *others: Any, heads: int, **options: Any) -> str | None:
    features = hidden.shape[2]
    if features > MAX_FEATURES:
        return f"{features} features are more than {MAX_FEATURES}, the most per program"
    if features > heads * MAX_HEAD_SIZE:
        return f"heads of {features // heads} features are more than {MAX_HEAD_SIZE}"
    return no_kernel_for(hidden)


qformer_layer.check(check)
qformer_layer.disables_autocast = True
qformer_layer.forward(forward)
qformer_layer.backward(backward)
qformer_layer.cost(cost)
qformer_layer.inputs(**SHAPES)(inputs)
