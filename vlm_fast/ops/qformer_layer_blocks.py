"""What the blocks of a Q-Former's layer have in common, and its MLP block, on rows of tokens.

A block is ``LayerNorm(dropout(dense(f(x))) + x)``, where f is self-attention, cross-attention or
the first half of an MLP. Its forward returns the result and the tensors for backward, in the order
in which backward takes them from an iterator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels import add_layer_norm as norms
from vlm_fast.kernels._attention_arguments import Masks, Strided
from vlm_fast.kernels._attention_rows import rows_forward
from vlm_fast.ops.mlp import gradients, hidden_and_saved
from vlm_fast.ops.qformer_layer_gradients import MLPNeeds
from vlm_fast.ops.qformer_layer_parameters import MLP

Saved = tuple[Tensor | None, ...]


class Options(NamedTuple):
    """The options of `qformer_layer`."""

    heads: int
    scale: float
    eps: float
    activation: str
    dropout: float
    attention_dropout: float


class Attention(NamedTuple):
    """An attention between rows of tokens: its sizes, see `_attention_rows`, its q, k and v."""

    sizes: tuple[int, ...]
    q: Strided
    k: Strided
    v: Strided


def attention_of_tokens(
    shape: Sequence[int], q: Tensor, k: Tensor, v: Tensor, options: Options
) -> Attention:
    """The attention between tokens; q, k and v: their rows, at one pitch."""
    batch, tokens, features = shape
    heads, d, row = options.heads, features // options.heads, q.stride(0)
    sizes, image = (batch, heads, heads, tokens, tokens, 0, d), tokens * row
    return Attention(sizes, (q, image, d, row), (k, image, d, row), (v, image, d, row))


def attention_to_image(q: Tensor, kv: Tensor, shared: bool, options: Options) -> Attention:
    """The attention of rows to keys and values, side by side in ``(images, keys, 2 * features)``.

    The rows of several sequences of an image are its queries.
    """
    (rows, features), (images, keys, _) = q.shape, kv.shape
    heads, d = options.heads, features // options.heads
    queries = rows if shared else rows // max(images, 1)
    sizes = (images, heads, heads, queries, keys, 0, d)
    k, v = kv.chunk(2, 2)
    image, token, _ = kv.stride()
    of_q = (q, 0 if shared else queries * features, d, features)
    return Attention(sizes, of_q, (k, image, d, token), (v, image, d, token))


def normed(
    x: Tensor, residual: Tensor, tail: Sequence[Tensor], seed: Tensor | None,
    options: Options, keep: bool,
) -> tuple[Tensor, Saved]:  # fmt: skip
    """``LayerNorm(dropout(x + bias) + residual)``; tail: the bias, the norm's weight and bias."""
    weight = tail[1].contiguous()
    y, statistics = norms.add_layer_norm(
        x, residual, weight, tail[2].contiguous(), tail[0].contiguous(), seed,
        eps=options.eps, dropout=options.dropout, want_statistics=keep,
    )  # fmt: skip
    return y, (*statistics, weight, seed)


def normed_backward(
    dy: Tensor, saved: Iterator[Any], tail: Sequence[bool], options: Options,
    *, want_x: bool, want_residual: bool,
) -> tuple[Any, Any, list[Any]]:  # fmt: skip
    """The gradients of x, of the residual and, where wanted, of the tail."""
    z, mean, rstd, weight, seed = islice(saved, 5)
    dx, dresidual, dweight, dbias, dx_bias = norms.add_layer_norm_backward(
        dy, (z, mean, rstd), weight, seed, dropout=options.dropout, x_dtype=dy.dtype,
        x_bias_dtype=dy.dtype if tail[0] else None, want_x=want_x, want_residual=want_residual,
        want_weight=tail[1], want_bias=tail[2],
    )  # fmt: skip
    return dx, dresidual, [dx_bias, dweight, dbias]


def attention_block(
    at: Attention, residual: Tensor, masks: Masks, tail: Sequence[Tensor], seed: Tensor | None,
    options: Options, *, keep: bool, keep_scores: bool, keep_attended: bool,
) -> tuple[Tensor, Saved]:  # fmt: skip
    """``LayerNorm(dropout(dense(attention)) + residual)``; tail: of the dense layer and norm."""
    attended = rows_forward(*at, masks, options.scale, options.attention_dropout)
    x = F.linear(attended, tail[0])
    if residual.ndim == 3:
        x = x.view(*residual.shape)
    y, of_norm = normed(x, residual, tail[1:], seed, options, keep)
    if not keep:
        return y, ()
    inner = (tail[0], *masks) if keep_scores else (None,) * 4
    return y, (*of_norm, attended if keep_attended else None, *inner)


def attention_block_backward(
    dy: Tensor, saved: Iterator[Any], tail: Sequence[bool], options: Options,
    *, want_scores: bool, want_residual: bool,
) -> tuple[Tensor | None, Any, list[Any], Masks]:  # fmt: skip
    """The gradients of the attention's result, the residual and the tail; the masks."""
    dx, dresidual, of_norm = normed_backward(
        dy, saved, tail[1:], options,
        want_x=want_scores or tail[0], want_residual=want_residual,
    )  # fmt: skip
    attended, dense, *masks = islice(saved, 5)
    ddense = torch.mm(dx.t(), attended) if tail[0] else None
    do = torch.mm(dx, dense) if want_scores else None
    return do, dresidual, [ddense, *of_norm], tuple(masks)


def mlp_block(
    x: Tensor, parameters: Sequence[Tensor], seed: Tensor | None, options: Options, needs: MLPNeeds
) -> tuple[Tensor, Saved]:
    """The last block, of the query or of the text tokens."""
    weight_1, bias_1, weight_2, *tail = parameters
    h, of_mlp = hidden_and_saved(
        needs.mlp, x, weight_1, bias_1, weight_2, options.activation, "preactivation"
    )
    keep = needs.any()
    y, of_norm = normed(F.linear(h, weight_2), x, tail, seed, options, keep)
    return y, (*of_norm, *(of_mlp or (None,) * 6)) if keep else ()


def mlp_block_backward(
    dy: Tensor, saved: Iterator[Any], options: Options, needs: MLPNeeds
) -> tuple[Tensor | None, list[Any]]:
    """The gradients of x and of the parameters."""
    if not needs.any():
        return None, [None] * MLP
    wanted = any(needs.mlp)
    dz, dresidual, of_norm = normed_backward(
        dy, saved, needs.parameters[3:], options, want_x=wanted, want_residual=needs.x
    )
    of_mlp = islice(saved, 6)
    if not wanted:
        list(of_mlp)  # what follows belongs to another block
        return None, [None, None, None, *of_norm]
    dx, *found, _ = gradients(needs.mlp, of_mlp, dz, options.activation, "preactivation", dresidual)
    return dx, [*found, *of_norm]
