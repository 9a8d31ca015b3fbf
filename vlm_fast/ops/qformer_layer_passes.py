"""The forward and the backward of `qformer_layer`."""

from __future__ import annotations

from typing import Any

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
from vlm_fast.ops.qformer_layer_parameters import CROSS, MLP, SELF


def forward(
    needs_grad, hidden, image_kv, parameters, bias, key_mask, image_mask, seeds,
    *, heads, scale, eps, activation, dropout, attention_dropout,
):  # fmt: skip
    """See `vlm_fast.ops.declaration`."""
    batch, tokens, features = hidden.shape
    scale = score_scale(scale, features // heads)
    options = Options(heads, scale, eps, activation, dropout, attention_dropout)
    needs = needs_of(needs_grad, image_kv is not None)
    seed_of = _seeds(seeds, options)
    x = dense(hidden.reshape(batch * tokens, features))
    masks = (bias, key_mask, seed_of[0])
    x, saved = self_attention_block(hidden, x, parameters[:SELF], masks, seed_of[1], options, needs)
    kv = None
    if image_kv is not None:
        kv = dense(image_kv)
        shared = batch == 1 and kv.shape[0] > 1
        x, of_cross = cross_attention_block(
            x, kv, shared, parameters[SELF:-MLP], (None, image_mask, seed_of[2]), seed_of[3],
            options, needs,
        )  # fmt: skip
        saved = (*of_cross, *saved)
        batch = kv.shape[0] if shared else batch
        kv = kv if needs.cross_scores else kv.new_empty(0)  # tells backward that there is an image
    x, of_mlp = mlp_block(x, parameters[-MLP:], seed_of[4], options, needs)
    y = x.view(batch, tokens, features)
    if not any(needs_grad):
        return y, ()
    return y, (kv, *of_mlp, *saved)


def _seeds(seeds: Tensor | None, options: Options) -> Any:
    """The seeds of those dropouts that are active."""
    if seeds is None or (options.dropout == 0 and options.attention_dropout == 0):
        return (None,) * 5
    attention = (options.attention_dropout, options.dropout)
    return [
        seeds[i] if p > 0 else None for i, p in enumerate((*attention, *attention, attention[1]))
    ]


def backward(
    needs_grad: Any, saved_tensors: Any, dy: Tensor,
    *, heads: int, scale: float | None, eps: float, activation: str, dropout: float,
    attention_dropout: float,
) -> tuple[Any, ...]:  # fmt: skip
    """See `vlm_fast.ops.declaration`."""
    batch, tokens, features = dy.shape
    scale = score_scale(scale, features // heads)
    options = Options(heads, scale, eps, activation, dropout, attention_dropout)
    saved = iter(saved_tensors)
    kv = next(saved)
    needs = needs_of(needs_grad, kv is not None)
    dhidden = dkv = dbias = None
    d: Any
    d, parameters = mlp_block_backward(
        dy.contiguous().view(batch * tokens, features), saved, options, needs
    )
    if kv is not None and needs.after_cross:
        d, dkv, of_block = cross_attention_block_backward(d, kv, saved, options, needs)
        parameters = of_block + parameters
    elif kv is not None:
        parameters = [None] * CROSS + parameters
    kv = None
    if needs.after_self:
        d, dbias, of_block = self_attention_block_backward(d, tokens, saved, options, needs)
        parameters = of_block + parameters
        dhidden = d if d is None else d.view(d.shape[0] // tokens, tokens, features)
    else:
        parameters = [None] * SELF + parameters
    return dhidden, dkv, parameters, dbias, None, None, None
