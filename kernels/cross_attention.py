"""Attention of few queries to many keys, from one source or two, and its backward."""

from __future__ import annotations

from torch import Tensor

from . import _cross_attention_aten as aten
from ._attention_arguments import (
    NOTHING_KEPT,
    Kept,
    by_strides,
    call_sizes,
    kept_by_strides,
    new_kept,
)
from ._cross_attention_backward import launch_backward
from ._cross_attention_forward import launch_forward
from ._launcher import dense, is_traced, runs_triton


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor | None, v2: Tensor | None,
    bias: Tensor | None, key_mask: Tensor | None, seed: Tensor | None,
    *, scale: float, dropout: float, o: Tensor | None = None, keep: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return o ``(batch, heads, queries, d)``, in memory ``(batch, queries, heads, d)``.

    The arguments are those of the op `cross_attention`; ``o`` is a tensor to fill. Where Triton
    runs in 16 bits, ``keep`` also returns what `attention_backward` needs: ``lse (batch, heads,
    queries)`` in fp32, see `log_sum_exp`, and ``low``, what the rounding of o took off, as o.
    """
    q, k, v = dense(q), dense(k), dense(v)
    k2, v2 = k2 if k2 is None else dense(k2), v2 if v2 is None else dense(v2)
    empty = q.numel() == 0 or k.shape[2] + (0 if k2 is None else k2.shape[2]) == 0
    o = aten.by_tokens(q) if o is None else o
    lse = low = None
    if empty:
        o.zero_()
    elif runs_triton(q):
        if keep:
            lse, low = new_kept(o, q.shape[:3])
        sources, masks = [by_strides(x) for x in (q, k, v, k2, v2)], (bias, key_mask, seed)
        launch_forward(call_sizes(q, k, k2), sources, masks, scale, dropout, o, lse, low)
    elif not is_traced(q):
        aten.forward(q, k, v, k2, v2, bias, key_mask, seed, scale, dropout, o)
    return o, lse, low


def attention_backward(
    do: Tensor,
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
    kept: Kept = NOTHING_KEPT,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v, k2 and v2, or None for those that are not wanted.

    Each is laid out in memory as ``(batch, tokens, heads, d)``. If ``into`` is given, the first
    three are written into its tensors, whose last stride must be 1, and those of k and v must have
    the same strides. kept: what `attention_forward` has returned.
    """
    do, q, k, v = dense(do), dense(q), dense(k), dense(v)
    k2, v2 = k2 if k2 is None else dense(k2), v2 if v2 is None else dense(v2)
    empty = q.numel() == 0 or k.shape[2] + (0 if k2 is None else k2.shape[2]) == 0
    if kept[1] is not None:  # one kernel yields the gradients of both sources
        want_kv = want_kv2 = want_kv or want_kv2
    targets = _targets(q, k, k2, want_q, want_kv, want_kv2, into)
    if empty:
        for target in targets:
            if target is not None:
                target.zero_()
    elif runs_triton(q):
        outer, *sources = [by_strides(x) for x in (do, q, k, v, k2, v2)]
        launch_backward(
            call_sizes(q, k, k2), outer, kept_by_strides(*kept), sources, (bias, key_mask, seed),
            scale, dropout, [by_strides(x) for x in targets],
        )  # fmt: skip
    elif not is_traced(q):
        aten.backward(do, q, k, v, k2, v2, bias, key_mask, seed, scale, dropout, *targets)
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
    """Allocate the tensors that `attention_backward` fills."""
    dq, dk, dv = into if into is not None else (None, None, None)
    dk2 = dv2 = None
    if into is None and want_q:
        dq = aten.by_tokens(q)
    if into is None and want_kv:
        dk, dv = (aten.by_tokens(k) for _ in range(2))
    if want_kv2 and k2 is not None:
        dk2, dv2 = (aten.by_tokens(k2) for _ in range(2))
    return dq if want_q else None, dk if want_kv else None, dv if want_kv else None, dk2, dv2
