"""`cross_attention` on a CPU, from ATen's matrix products and softmax.

Images are processed one by one, so that their scores stay in cache. ATen's flash attention,
with its backward, is no faster here and less exact. The heads that share a key head are one matrix
of rows, so each key is read once and its gradient is summed by the matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dropout import keep_mask
from ._launcher import is_traced

_softmax_backward = torch.ops.aten._softmax_backward_data


def forward(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor | None, v2: Tensor | None,
    bias: Tensor | None, key_mask: Tensor | None, seed: Tensor | None,
    scale: float, dropout: float, o: Tensor,
) -> None:  # fmt: skip
    """Fill o ``(batch, heads, queries, d)``."""
    rows = _packed(q, k.shape[1])
    for image in range(q.shape[0]):
        p = _probabilities(image, rows, k, k2, bias, key_mask, q.shape[1:3], scale)
        if dropout > 0 and seed is not None:
            p *= _dropout_factor(image, q.shape, p.shape, seed, dropout)
        found = torch.bmm(p[..., : k.shape[2]], v[image].float())
        if v2 is not None:
            found.baddbmm_(p[..., k.shape[2] :], v2[image].float())
        o[image] = found.view(q.shape[1:])


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, k2: Tensor | None, v2: Tensor | None,
    bias: Tensor | None, key_mask: Tensor | None, seed: Tensor | None,
    scale: float, dropout: float,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None,
    dk2: Tensor | None, dv2: Tensor | None,
) -> None:  # fmt: skip
    """Fill those of dq, dk, dv, dk2 and dv2 that are not None."""
    keys = k.shape[2]
    rows, drows = _packed(q, k.shape[1]), _packed(do, k.shape[1])
    for image in range(q.shape[0]):
        q_here, do_here = rows[image].float(), drows[image].float()
        p, ds = _score_gradients(
            image, rows, do_here, k, v, k2, v2, bias, key_mask, seed, q, scale, dropout
        )
        ds *= scale
        if dq is not None:
            found = torch.bmm(ds[..., :keys], k[image].float())
            if k2 is not None:
                found.baddbmm_(ds[..., keys:], k2[image].float())
            dq[image] = found.view(q.shape[1:])
        first, second = slice(0, keys), slice(keys, None)
        for grad, weights, x, part in (
            (dk, ds, q_here, first), (dv, p, do_here, first),
            (dk2, ds, q_here, second), (dv2, p, do_here, second),
        ):  # fmt: skip
            if grad is not None:
                grad[image] = torch.bmm(weights[..., part].transpose(1, 2), x)


def bias_gradient(
    do: Tensor,
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor | None, v2: Tensor | None,
    bias: Tensor, key_mask: Tensor | None, seed: Tensor | None,
    scale: float, dropout: float,
) -> Tensor:  # fmt: skip
    """The gradient of the bias, from the full matrix of score gradients. It runs on GPUs too."""
    if is_traced(q):
        return torch.empty_like(bias, memory_format=torch.contiguous_format)
    keys = k.shape[2] + (0 if k2 is None else k2.shape[2])
    if q.numel() * keys == 0:
        return torch.zeros_like(bias, memory_format=torch.contiguous_format)
    rows, drows = _packed(q, k.shape[1]), _packed(do, k.shape[1])
    every = q.new_empty(*q.shape[:3], keys, dtype=torch.float32)
    for image in range(q.shape[0]):
        _, ds = _score_gradients(
            image, rows, drows[image].float(), k, v, k2, v2, bias, key_mask, seed, q,
            scale, dropout,
        )  # fmt: skip
        every[image] = ds.view(every.shape[1:])
    return every.sum_to_size(bias.shape).to(bias.dtype)


def _score_gradients(
    image: int, rows: Tensor, do: Tensor, k: Tensor, v: Tensor,
    k2: Tensor | None, v2: Tensor | None, bias: Tensor | None, key_mask: Tensor | None,
    seed: Tensor | None, q: Tensor, scale: float, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The probabilities after dropout and the gradient of the scores of one image, in fp32."""
    p = _probabilities(image, rows, k, k2, bias, key_mask, q.shape[1:3], scale)
    dp = _products(do, v[image], None if v2 is None else v2[image])
    factor = None
    if dropout > 0 and seed is not None:
        factor = _dropout_factor(image, q.shape, p.shape, seed, dropout)
        dp *= factor
    ds = softmax_gradient(dp, p)
    if key_mask is not None:
        ds.masked_fill_(~key_mask[image], 0)  # 0 even if p is NaN
    return p if factor is None else p * factor, ds


def softmax_gradient(dp: Tensor, p: Tensor) -> Tensor:
    """The gradient of the scores, from the gradient dp of their softmax p. Overwrites dp.

    The mean of dp is subtracted here and once more by ATen, where it is nearly 0. So each row of
    the result sums to 0 within fp32's rounding, even if one key has all the weight.
    """
    dp -= torch.linalg.vecdot(dp, p)[..., None].nan_to_num_(0, 0, 0)
    return _softmax_backward(dp, p, -1, dp.dtype)


def _probabilities(
    image: int, rows: Tensor, k: Tensor, k2: Tensor | None, bias: Tensor | None,
    key_mask: Tensor | None, heads_and_queries: torch.Size, scale: float,
) -> Tensor:  # fmt: skip
    """The probabilities ``(kv_heads, rows, keys)`` of one image, in fp32."""
    s = _products(rows[image].float(), k[image], None if k2 is None else k2[image]).mul_(scale)
    if bias is not None:
        by_head = s.view(*heads_and_queries, -1)
        by_head += bias[image if bias.shape[0] > 1 else 0]
    if key_mask is not None:
        s.masked_fill_(~key_mask[image], -torch.inf)
    p = torch.softmax(s, -1)
    if s.is_cpu and not p[..., 0].isnan().any():
        return p
    return torch.ops.aten._safe_softmax(s, -1)  # all keys masked: zeros


def _products(rows: Tensor, x: Tensor, x2: Tensor | None) -> Tensor:
    """Products ``(kv_heads, rows, keys)`` of rows with the tokens of both sources."""
    if x2 is None:
        return torch.bmm(rows, x.float().transpose(1, 2))
    out = rows.new_empty(*rows.shape[:2], x.shape[1] + x2.shape[1])
    torch.bmm(rows, x.float().transpose(1, 2), out=out[..., : x.shape[1]])
    torch.bmm(rows, x2.float().transpose(1, 2), out=out[..., x.shape[1] :])
    return out


def _dropout_factor(
    image: int, q_shape: torch.Size, shape: torch.Size, seed: Tensor, dropout: float
) -> Tensor:
    """Dropout's factor ``(kv_heads, rows, keys)`` for the probabilities of one image."""
    heads, queries = q_shape[1:3]
    key, query, head = (
        torch.arange(n, device=seed.device) for n in (shape[2], queries, heads)
    )  # fmt: skip
    head = head[:, None, None] + image * heads
    survives = keep_mask(seed, dropout, key, query[:, None], head)
    return survives.view(shape).float().div_(1 - dropout)


def _packed(x: Tensor, kv_heads: int) -> Tensor:
    """``(batch, heads, queries, d)`` as ``(batch, kv_heads, rows, d)``: heads become rows."""
    if x.shape[1] == kv_heads:
        return x
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[3])


def by_tokens(like: Tensor) -> Tensor:
    """An empty ``(batch, heads, tokens, d)`` laid out in memory as ``(batch, tokens, heads, d)``.

    It is not a view of another tensor.
    """
    _, heads, tokens, d = like.shape
    strides = (tokens * heads * d, d, heads * d, 1)
    return torch.empty_strided(like.shape, strides, dtype=like.dtype, device=like.device)
