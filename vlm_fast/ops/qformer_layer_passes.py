"""The forward and the backward of `qformer_layer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_fast.kernels._launcher import dense
from vlm_fast.ops.cross_attention import score_scale
from vlm_fast.ops.qformer_layer_attention import (
    cross_attention_block,
    cross_attention_block_backward,
    self_attention_block,
    self_attention_block_backward,
)
from vlm_fast.ops.qformer_layer_blocks import Options, mlp_block, mlp_block_backward
from vlm_fast.ops.qformer_layer_gradients import needs_of
from vlm_fast.ops.qformer_layer_parameters import CROSS, SELF, split


def forward(
    needs_grad, hidden, image_kv, parameters, bias, key_mask, image_mask, seeds,
    *, heads, text, scale, eps, activation, dropout, attention_dropout,
):  # fmt: skip
    """See `vlm_fast.ops.declaration`."""
    batch, tokens, features = hidden.shape
    scale = score_scale(scale, features // heads)
    options = Options(heads, scale, eps, activation, dropout, attention_dropout)
    queries = tokens - text
    present = image_kv is not None, bool(queries > 0)  # hashable while traced
    needs = needs_of(needs_grad, *present)
    of_self, of_cross, of_queries, of_text = split(parameters, *present)
    seed_of = _seeds(seeds, options)
    x = dense(hidden.reshape(batch * tokens, features))
    masks = (bias, key_mask, seed_of[0])
    x, saved = self_attention_block(hidden, x, of_self, masks, seed_of[1], options, needs)
    if text:
        words = x
        if queries:
            x, words = _parts(x.view(batch, tokens, features), queries)
        words, of_block = mlp_block(words, of_text, seed_of[5], options, needs.text)
        saved = (*of_block, *saved)
        if not queries:
            return words.view(batch, tokens, features), (None, *saved) if any(needs_grad) else ()
    kv = None
    if image_kv is not None:
        kv = dense(image_kv)
        shared = batch == 1 and kv.shape[0] > 1
        x, of_block = cross_attention_block(
            x, kv, shared, of_cross, (None, image_mask, seed_of[2]), seed_of[3], options, needs
        )
        saved = (*of_block, *saved)
        batch = kv.shape[0] if shared else batch
        kv = kv if needs.cross_scores else kv.new_empty(0)  # tells backward that there is an image
    x, of_mlp = mlp_block(x, of_queries, seed_of[4], options, needs.queries)
    y = x.view(batch, queries, features)
    if text:
        y = torch.cat((y, words.view(batch, text, features)), 1)
    if not any(needs_grad):
        return y, ()
    return y, (kv, *of_mlp, *saved)


def _seeds(seeds: Tensor | None, options: Options) -> Any:
    """The seeds of those dropouts that are active."""
    if seeds is None or (options.dropout == 0 and options.attention_dropout == 0):
        return (None,) * 6
    attention = (options.attention_dropout, options.dropout)
    return [
        seeds[i] if p > 0 else None
        for i, p in enumerate((*attention, *attention, options.dropout, options.dropout))
    ]


def _parts(x: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """The rows of the query tokens and those of the text tokens of x ``(batch, tokens, ...)``."""
    features = x.shape[2]
    words = x.narrow(1, queries, x.shape[1] - queries)
    return x.narrow(1, 0, queries).reshape(-1, features), words.reshape(-1, features)


def backward(
    needs_grad: Any, saved_tensors: Any, dy: Tensor,
    *, heads: int, text: int, scale: float | None, eps: float, activation: str, dropout: float,
    attention_dropout: float,
) -> tuple[Any, ...]:  # fmt: skip
    """See `vlm_fast.ops.declaration`."""
    batch, tokens, features = dy.shape
    scale = score_scale(scale, features // heads)
    options = Options(heads, scale, eps, activation, dropout, attention_dropout)
    saved = iter(saved_tensors)
    kv, queries = next(saved), tokens - text
    needs = needs_of(needs_grad, kv is not None, bool(queries > 0))
    dhidden = dkv = dbias = None
    d: Any
    dwords: Any
    if queries and text:
        d, dwords = _parts(dy, queries)
    else:
        d = dwords = dy.contiguous().view(batch * tokens, features)
    parameters: list[Any] = []
    if queries:
        d, parameters = mlp_block_backward(d, saved, options, needs.queries)
    if kv is not None and needs.after_cross:
        d, dkv, of_block = cross_attention_block_backward(d, kv, saved, options, needs)
        parameters = of_block + parameters
    elif kv is not None:
        parameters = [None] * CROSS + parameters
    kv = None
    if text:
        dwords, of_block = mlp_block_backward(dwords, saved, options, needs.text)
        parameters += of_block
        if not queries:
            d = dwords
        elif needs.after_self:
            parts = d.view(batch, queries, features), dwords.view(batch, text, features)
            d = torch.cat(parts, 1).view(batch * tokens, features)
    if needs.after_self:
        d, dbias, of_block = self_attention_block_backward(d, tokens, saved, options, needs)
        parameters = of_block + parameters
        dhidden = d if d is None else d.view(d.shape[0] // tokens, tokens, features)
    else:
        parameters = [None] * SELF + parameters
    return dhidden, dkv, parameters, dbias, None, None, None
