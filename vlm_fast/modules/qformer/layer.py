"""One layer of a Q-Former, over any module tree with BERT's and BLIP-2's names.

    attention.attention.{query, key, value}     attention.output.{dense, LayerNorm, dropout}
    crossattention, in some layers, likewise
    intermediate_query.dense, output_query.{dense, LayerNorm, dropout}       of query tokens
    intermediate.dense, output.{dense, LayerNorm, dropout}                   of text tokens

The same functions run transformers' own layers and those of `vlm_fast.modules.QFormer`. If a child
must be called as a module (LoRA, quantization, hooks), all children are called; the operations
between them stay fused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.modules.parameter_access.activation import activation_name
from vlm_fast.modules.parameter_access.attention_settings import (
    active_attention_dropout,
    attention_scale,
)
from vlm_fast.modules.parameter_access.module_view import view_of
from vlm_fast.modules.qformer.layer_inputs import LayerInputs
from vlm_fast.modules.qformer.whole_layer import run_as_one_op

# Indices of the seeds of a layer.
SELF, SELF_OUTPUT, CROSS, CROSS_OUTPUT, QUERY_OUTPUT, TEXT_OUTPUT = range(6)
SEEDS = 6
# Names of the children that are called if their parameters cannot be read directly.
CALLED_CHILDREN = {"query", "key", "value", "dense", "LayerNorm", "dropout", "intermediate_act_fn"}


def qformer_layer(
    layer: Any,
    hidden: Tensor,
    image: Tensor | None = None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
    *,
    inputs: LayerInputs,
) -> Any:
    """Run a layer on ``hidden (batch, tokens, features)``, queries before text.

    Args:
        layer: a module with the children named at the top of this file.
        hidden: the tokens.
        image: features ``(images, keys, width)``; or, if ``inputs.projected``, keys and values
            ``(images, keys, 2 * features)``; None without cross-attention.
        past_k, past_v: ``(batch, heads, past, d)``, keys and values of earlier tokens, which every
            token attends to.
        inputs: the other inputs.

    Returns:
        The tokens; with ``inputs.keep`` also the keys and values of the self-attention.
    """
    if inputs.plain:
        if past_k is None and not inputs.keep:
            found = run_as_one_op(layer, hidden, image, inputs)
            if found is not None:
                return found
        layer = view_of(layer)
    hidden, *kept = self_attention_block(layer.attention, hidden, past_k, past_v, inputs)
    hidden = _after_self_attention(layer, hidden, image, inputs)
    return (hidden, *kept) if inputs.keep else hidden


def _after_self_attention(
    layer: Any, hidden: Tensor, image: Tensor | None, inputs: LayerInputs
) -> Tensor:
    n = inputs.query_length
    if n == 0:
        return _feed_forward(layer.intermediate, layer.output, hidden, inputs, TEXT_OUTPUT)
    has_text = hidden.shape[1] > n
    queries = hidden[:, :n] if has_text else hidden
    crossattention = getattr(layer, "crossattention", None)
    if crossattention is not None:
        queries = cross_attention_block(crossattention, queries, image, inputs)
    queries = _feed_forward(
        layer.intermediate_query, layer.output_query, queries, inputs, QUERY_OUTPUT
    )
    if not has_text:
        return queries
    text = _feed_forward(layer.intermediate, layer.output, hidden[:, n:], inputs, TEXT_OUTPUT)
    return torch.cat((queries, text), dim=1)


def self_attention_block(
    block: Any,
    hidden: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    inputs: LayerInputs,
) -> tuple[Tensor, ...]:
    """``LayerNorm(dense(attention(hidden)) + hidden)``, and keys and values if ``inputs.keep``."""
    attention = block.attention
    heads: int = attention.num_attention_heads
    dropout = active_attention_dropout(attention)
    seed = inputs.seed(SELF) if dropout > 0 else None
    linears = (attention.query, attention.key, attention.value)
    if inputs.plain and past_k is None and not inputs.keep:
        attended = ops.self_attention(
            hidden, weights_and_biases(linears), inputs.bias, inputs.key_mask, seed,
            heads=heads, scale=attention_scale(attention), dropout=dropout,
        )  # fmt: skip
        return (_add_and_norm(block.output, attended, hidden, inputs, SELF_OUTPUT),)
    if inputs.plain:
        qkv = ops.stacked_linear(hidden, weights_and_biases(linears))
        q, k, v = (_by_head(part, heads) for part in qkv.chunk(3, dim=-1))
    else:
        q, k, v = (_by_head(linear(hidden), heads) for linear in linears)
    attended = ops.cross_attention(
        q, k, v, past_k, past_v, inputs.bias, inputs.key_mask, seed,
        scale=attention_scale(attention), dropout=dropout,
    )  # fmt: skip
    found = _add_and_norm(block.output, _joined(attended), hidden, inputs, SELF_OUTPUT)
    return found, k, v


def cross_attention_block(
    block: Any, queries: Tensor, image: Tensor | None, inputs: LayerInputs
) -> Tensor:
    """``LayerNorm(dense(attention(queries, image)) + queries)``."""
    attention, mask = block.attention, inputs.image_mask
    if image is None:
        raise ValueError(
            "vlm_fast.QFormer: encoder_hidden_states is None, expected (batch, keys, width) "
            "features for the cross-attention layers"
        )
    heads: int = attention.num_attention_heads
    dropout = active_attention_dropout(attention)
    seed = inputs.seed(CROSS) if dropout > 0 else None
    q = (
        F.linear(queries, attention.query.weight, attention.query.bias)
        if inputs.plain
        else attention.query(queries)
    )
    sequences, tokens, features = q.shape
    images = image.shape[0]
    if sequences == 1 and images != 1:  # the same queries for every image
        q, queries, sequences = q.expand(images, -1, -1), queries.expand(images, -1, -1), images
    if sequences != images:  # several sequences per image: treated as more queries of it
        q = q.reshape(images, -1, features)
    key, value = attention.key, attention.value
    if inputs.projected:
        k, v = image.chunk(2, dim=-1)
    elif inputs.plain:
        k, v = ops.stacked_linear(image, weights_and_biases((key, value))).chunk(2, dim=-1)
    else:
        k, v = key(image), value(image)
    attended = ops.cross_attention(
        _by_head(q, heads), _by_head(k, heads), _by_head(v, heads), None, None, inputs.image_bias,
        mask, seed, scale=attention_scale(attention), dropout=dropout,
    )  # fmt: skip
    attended = _joined(attended).reshape(sequences, tokens, features)
    return _add_and_norm(block.output, attended, queries, inputs, CROSS_OUTPUT)


def _feed_forward(
    intermediate: Any, output: Any, hidden: Tensor, inputs: LayerInputs, seed: int
) -> Tensor:
    """``LayerNorm(dense_2(act(dense_1(hidden))) + hidden)``."""
    act = intermediate.intermediate_act_fn
    if not inputs.plain:
        inner = act(intermediate.dense(hidden))
        return _add_and_norm(output, inner, hidden, inputs, seed)
    first, second, norm = intermediate.dense, output.dense, output.LayerNorm
    name = activation_name(act) or ""  # never empty: a direct tree has known activations only
    inner = ops.mlp(hidden, first.weight, first.bias, second.weight, None, activation=name)
    return _normed(norm, output.dropout, inner, hidden, second.bias, inputs, seed)


def _add_and_norm(
    output: Any, x: Tensor, residual: Tensor, inputs: LayerInputs, seed: int
) -> Tensor:
    """``LayerNorm(dropout(dense(x)) + residual)``."""
    dense, norm = output.dense, output.LayerNorm
    if not inputs.plain:
        return norm(output.dropout(dense(x)) + residual)
    return _normed(
        norm, output.dropout, F.linear(x, dense.weight), residual, dense.bias, inputs, seed
    )


def _normed(
    norm: nn.LayerNorm, dropout: nn.Dropout, x: Tensor, residual: Tensor, bias: Tensor | None,
    inputs: LayerInputs, seed: int,
) -> Tensor:  # fmt: skip
    p = dropout.p if dropout.training else 0.0
    return ops.add_layer_norm(
        x, residual, norm.weight, norm.bias, bias, inputs.seed(seed) if p > 0 else None,
        eps=norm.eps, dropout=p,
    )  # fmt: skip


def weights_and_biases(linears: Any) -> list[Tensor]:
    """The weights of linears, then their biases."""
    return [linear.weight for linear in linears] + [linear.bias for linear in linears]


def _by_head(x: Tensor, heads: int) -> Tensor:
    batch, tokens, features = x.shape
    return x.view(batch, tokens, heads, features // heads).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    batch, heads, tokens, d = x.shape
    return x.transpose(1, 2).reshape(batch, tokens, heads * d)
