"""Attention of text tokens to the media (images) that each token may attend to."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _media_cross_attention_aten as aten
from ._attention_arguments import NOTHING_KEPT, Kept, new_kept
from ._cross_attention_aten import by_tokens
from ._launcher import dense, is_traced, runs_triton
from ._media_attention_tilings import sees_one_tile
from ._media_cross_attention_backward import launch_backward
from ._media_cross_attention_forward import launch_forward
from ._query_norm import norm_backward, normed, norms_inside


def media_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    media_index: Tensor,
    q_norm: Tensor | None,
    *,
    tokens_per_media: int,
    attend: str,
    unattended: str,
    scale: float,
    eps: float,
    keep: bool = False,
) -> tuple[Tensor, Kept]:
    """Return o ``(batch, heads, queries, d)``, in memory ``(batch, queries, heads, d)``.

    The arguments are those of the op `media_cross_attention`. An index of a medium that does not
    exist selects nothing. Where Triton runs in 16 bits, ``keep`` also returns what
    `media_attention_backward` needs: ``lse (batch, heads, queries)`` in fp32, see `log_sum_exp`,
    and but where `sees_one_tile` holds o and ``low``, what the rounding of o took off, as o.
    """
    q, k, v, index = dense(q), dense(k), dense(v), media_index.contiguous()
    if q_norm is not None and not norms_inside(q):
        q, q_norm = normed(q, q_norm, eps)[0], None
    empty = q.numel() == 0 or k.shape[2] == 0
    if not (runs_triton(q) or is_traced(q) or empty):
        o = aten.forward(q, k, v, index, tokens_per_media, attend, unattended, scale)
        return o, NOTHING_KEPT
    o, lse, low = by_tokens(q), None, None
    if empty:
        o.zero_()
    elif runs_triton(q):
        q_norm = q_norm if q_norm is None else q_norm.contiguous()
        if keep:
            one_tile = sees_one_tile(q, k, q_norm, tokens_per_media, attend, unattended)
            lse, low = new_kept(o, q.shape[:3], with_low=not one_tile)
        launch_forward(
            q, k, v, index, q_norm, tokens_per_media, attend, unattended, scale, eps, o, lse, low
        )  # fmt: skip
    return o, (None if low is None else o, lse, low)


def media_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    media_index: Tensor,
    q_norm: Tensor | None,
    *,
    tokens_per_media: int,
    attend: str,
    unattended: str,
    scale: float,
    eps: float,
    want_q: bool,
    want_kv: bool,
    kept: Kept = NOTHING_KEPT,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v and q_norm, or None for those that are not wanted.

    The first three are laid out in memory as ``(batch, tokens, heads, d)``. The gradient of q_norm
    is computed whenever q's is. kept: what `media_attention_forward` has returned.
    """
    if q_norm is not None and not norms_inside(q):
        unit, inverse = normed(q, q_norm, eps)
        dnormed, dk, dv, _ = media_attention_backward(
            do, unit, k, v, media_index, None, tokens_per_media=tokens_per_media, attend=attend,
            unattended=unattended, scale=scale, eps=eps, want_q=want_q, want_kv=want_kv,
        )  # fmt: skip
        if dnormed is None:
            return None, dk, dv, None
        found = norm_backward(dnormed, q, q_norm, inverse)
        return found[0], dk, dv, found[1]
    do, q, k, v = dense(do), dense(q), dense(k), dense(v)
    index = media_index.contiguous()
    dq = by_tokens(q) if want_q else None
    batch, kv_heads, keys, d = k.shape
    dkv = k.new_empty(2, batch, keys, kv_heads, d).transpose(2, 3) if want_kv else None
    dk, dv = (None, None) if dkv is None else dkv
    dq_norm: Tensor | None = None
    if q.numel() == 0 or k.shape[2] == 0:
        for gradient in (dq, dkv):
            if gradient is not None:
                gradient.zero_()
        if q_norm is not None and want_q:
            dq_norm = torch.zeros_like(q_norm)
    elif runs_triton(q):
        q_norm = q_norm if q_norm is None else q_norm.contiguous()
        dq_norm = launch_backward(
            do, q, k, v, index, q_norm, tokens_per_media, attend, unattended, scale, eps, kept,
            dq, dkv,
        )  # fmt: skip
    elif not is_traced(q):
        aten.backward(
            do, q, k, v, index, tokens_per_media, attend, unattended, scale, dq, dk, dv
        )  # fmt: skip
    return dq, dk, dv, dq_norm
