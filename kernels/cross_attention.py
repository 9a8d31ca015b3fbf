"""Attention of few queries against many keys, of one source or two."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _cross_attention_aten as aten
from ._launcher import is_traced, runs_triton


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k2: Tensor | None,
    v2: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    *,
    scale: float,
    dropout: float,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """The result ``(batch, heads, queries, d)``, in memory ``(batch, queries, heads, d)``, and lse.

    Arguments as of the op `cross_attention`. ``lse (batch, heads, queries)``, fp32, is the natural
    logarithm of the sum of exponentials, 0 where no key is seen.
    """
    batch, heads, queries, d = q.shape
    keys = k.shape[2] + (0 if k2 is None else k2.shape[2])
    if q.numel() == 0 or keys == 0:
        o = by_rows(q, heads, queries).zero_()
        return o, q.new_zeros(q.shape[:3], dtype=torch.float32) if want_lse else None
    q, k, v = dense(q), dense(k), dense(v)
    k2, v2 = k2 if k2 is None else dense(k2), v2 if v2 is None else dense(v2)
    if is_traced(q):
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        return by_rows(q, heads, queries), lse if want_lse else None
    o, lse = aten.forward(q, k, v, k2, v2, bias, key_mask, seed, scale, dropout)
    return o, lse if want_lse else None


def attention_backward(
    do: Tensor,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k2: Tensor | None,
    v2: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    *,
    scale: float,
    dropout: float,
    want_q: bool,
    want_kv: bool,
    want_kv2: bool,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, k2 and v2, None where not wanted; ``o`` and ``lse`` of the forward.

    Each lies in memory as ``(batch, tokens, heads, d)``, the first three in ``into`` if given,
    whose last strides are 1.
    """
    do, q, k, v = dense(do), dense(q), dense(k), dense(v)
    k2, v2 = k2 if k2 is None else dense(k2), v2 if v2 is None else dense(v2)
    want_kv2 = want_kv2 and k2 is not None
    if not (runs_triton(q) or is_traced(q)) and q.numel() > 0 and k.shape[2] > 0:
        found = aten.backward(
            do, o, lse, q, k, v, k2, v2, bias, key_mask, seed, scale, dropout,
            want_q, want_kv, want_kv2,
        )  # fmt: skip
        return found if into is None else _copied(found, into)
    targets = _targets(q, k, k2, want_q, want_kv, want_kv2, into)
    for target in targets:
        if target is not None:
            target.zero_()
    return targets


def _targets(
    q: Tensor,
    k: Tensor,
    k2: Tensor | None,
    want_q: bool,
    want_kv: bool,
    want_kv2: bool,
    into: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor | None, ...]:
    dq, dk, dv = into if into is not None else (None, None, None)
    dk2 = dv2 = None
    if into is None and want_q:
        dq = by_rows(q, q.shape[1], q.shape[2])
    if into is None and want_kv:
        dk, dv = (by_rows(k, k.shape[1], k.shape[2]) for _ in range(2))
    if want_kv2 and k2 is not None:
        dk2, dv2 = (by_rows(k2, k2.shape[1], k2.shape[2]) for _ in range(2))
    return dq if want_q else None, dk if want_kv else None, dv if want_kv else None, dk2, dv2


def _copied(
    found: tuple[Tensor | None, ...], into: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor | None, ...]:
    return tuple(
        t if t is None or i > 2 else into[i].copy_(t) for i, t in enumerate(found)
    )  # fmt: skip


def dense(x: Tensor) -> Tensor:
    """x with a last stride of 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def by_rows(like: Tensor, heads: int, tokens: int) -> Tensor:
    """An empty ``(batch, heads, tokens, d)`` in memory ``(batch, tokens, heads, d)``, no view."""
    batch, _, _, d = like.shape
    strides = (tokens * heads * d, d, heads * d, 1)
    return torch.empty_strided(
        (batch, heads, tokens, d), strides, dtype=like.dtype, device=like.device
    )
