"""The attention blocks of a Q-Former's layer on rows of tokens, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels._attention_arguments import ABSENT, Masks
from vlm_fast.kernels._attention_rows import by_head, rows_backward
from vlm_fast.kernels._cross_attention_aten import bias_gradient
from vlm_fast.kernels._linear_activation import FEW_ROWS
from vlm_fast.kernels._packed_weights import input_gradient, parameter_gradients
from vlm_fast.ops.qformer_layer_blocks import (
    Options,
    Saved,
    attention_block,
    attention_block_backward,
    attention_of_tokens,
    attention_to_image,
)
from vlm_fast.ops.qformer_layer_gradients import Needs


def self_attention_block(
    hidden: Tensor, x: Tensor, parameters: Sequence[Tensor], masks: Masks, seed: Tensor | None,
    options: Options, needs: Needs,
) -> tuple[Tensor, Saved]:  # fmt: skip
    """The first block; x: the rows of ``hidden (batch, tokens, features)``."""
    weights = weight_q, weight_k, weight_v = parameters[:3]
    q = F.linear(x, weight_q, parameters[3])
    k, v = F.linear(x, weight_k, parameters[4]), F.linear(x, weight_v, parameters[5])
    at = attention_of_tokens(hidden.shape, q, k, v, options)
    y, of_block = attention_block(
        at, x, masks, parameters[6:], seed, options,
        keep=needs.after_self, keep_scores=needs.scores, keep_attended=needs.first[6],
    )  # fmt: skip
    if not needs.after_self:
        return y, ()
    return y, (
        *of_block, *((q, k, v) if needs.scores else (None,) * 3),
        hidden if any(needs.first[:3]) else None, *(weights if needs.x else (None,) * 3),
    )  # fmt: skip


def self_attention_block_backward(
    dy: Tensor, tokens: int, saved: Iterator[Any], options: Options, needs: Needs
) -> tuple[Tensor | None, Tensor | None, list[Any]]:
    """The gradients of x, of the bias of the scores and of the parameters."""
    do, dresidual, dtail, masks, kept = attention_block_backward(
        dy, saved, needs.first[6:], options, want_scores=needs.scores, want_residual=needs.x
    )
    q, k, v, hidden, *weights = islice(saved, 7)
    dbias = dx = None
    if do is None:
        return None, None, [*[None] * 6, *dtail]
    rows, features = do.shape
    shape = (rows // tokens, tokens, features)
    at = attention_of_tokens(shape, q, k, v, options)
    outer = (do, at.sizes[3] * features, at.sizes[6], features)
    if needs.bias:
        do4, q4, k4, v4 = by_head(at.sizes, outer, *at[1:])
        added, key_mask, seed = masks
        dbias = bias_gradient(
            do4, q4, k4, v4, None, None, added, key_mask, seed,  # type: ignore[arg-type]
            options.scale, options.attention_dropout,
        )  # fmt: skip
    if not (needs.x or any(needs.first[:6])):
        return None, dbias, [*[None] * 6, *dtail]
    dqkv = do.new_empty(rows, 3 * features)
    dq, dk, dv = dqkv.chunk(3, 1)
    into = attention_of_tokens(shape, dq, dk, dv, options)
    rows_backward(
        at.sizes, outer, kept, *at[1:], masks, options.scale, options.attention_dropout, *into[1:]
    )
    del do, outer, kept, at, q, k, v
    x: Any = None if hidden is None else hidden.reshape(rows, features)
    # The bias of keys adds one number to all scores of a query.
    sizes, apart = [features] * 3, rows <= FEW_ROWS
    found = parameter_gradients(dqkv, x, sizes, needs.first[:6], zero=1, apart=apart)
    if needs.x:
        dx = input_gradient(dqkv, weights, dresidual)
    return dx, dbias, [*found, *dtail]


def cross_attention_block(
    x: Tensor, kv: Tensor, shared: bool, parameters: Sequence[Tensor], masks: Masks,
    seed: Tensor | None, options: Options, needs: Needs,
) -> tuple[Tensor, Saved]:  # fmt: skip
    """The second block. x: the rows of all sequences, or of one that all images share."""
    q = F.linear(x, parameters[0], parameters[1])
    residual = x.expand(kv.shape[0], *x.shape) if shared else x
    y, of_block = attention_block(
        attention_to_image(q, kv, shared, options), residual, masks, parameters[2:], seed, options,
        keep=needs.after_cross, keep_scores=needs.cross_scores, keep_attended=needs.cross[2],
    )  # fmt: skip
    y = y.view(-1, x.shape[1]) if shared else y
    if not needs.after_cross:
        return y, ()
    weight = parameters[0] if needs.after_self else None
    inner = (q if needs.cross_scores else None, x if needs.cross[0] else None)
    return y, (*of_block, *inner, weight)


def cross_attention_block_backward(
    dy: Tensor, kv: Tensor, saved: Iterator[Any], options: Options, needs: Needs
) -> tuple[Tensor | None, Tensor | None, list[Any]]:
    """The gradients of x, of the keys and values and of the parameters."""
    dx: Any
    do, dx, dtail, masks, kept = attention_block_backward(
        dy, saved, needs.cross[2:], options,
        want_scores=needs.cross_scores, want_residual=needs.after_self,
    )  # fmt: skip
    q, x, weight = islice(saved, 3)
    if do is None or q is None:
        return None, None, [None, None, *dtail]
    (rows, features), (images, keys, width) = do.shape, kv.shape
    shared = rows != q.shape[0]
    at = attention_to_image(q, kv, shared, options)
    image, d = at.sizes[3] * features, at.sizes[6]
    dq: Any = None
    dkv = None
    into_q = into_k = into_v = ABSENT
    if needs.after_self or any(needs.cross[:2]):
        dq = do.new_empty(rows, features)
        into_q = (dq, image, d, features)
    if needs.kv:
        dkv = kv.new_empty(images, keys, width)
        into_k, into_v = ((part, keys * width, d, width) for part in dkv.chunk(2, 2))
    outer = (do, image, d, features)
    rows_backward(
        at.sizes, outer, kept, *at[1:], masks, options.scale, options.attention_dropout,
        into_q, into_k, into_v,
    )  # fmt: skip
    if dq is None:
        return None, dkv, [None, None, *dtail]
    if shared:
        dq = dq.view(images, *q.shape).sum(0)
        dx = dx if dx is None else dx.view(images, *q.shape).sum(0)
    found = parameter_gradients(dq, x, [features], needs.cross[:2])
    return input_gradient(dq, [weight], dx) if needs.after_self else None, dkv, [*found, *dtail]
