"""Attention over matrices whose rows are tokens, with all heads side by side, without views.

Calls take the sizes ``(images, heads, heads, queries, keys, 0, d)`` and for q, k, v and their
gradients a tensor with its strides along images, heads and tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._attention_arguments import ABSENT, Kept, Masks, Strided, new_kept
from ._cross_attention_backward import launch_backward
from ._cross_attention_forward import launch_forward
from ._launcher import runs_triton
from .cross_attention import attention_backward, attention_forward


def rows_forward(
    sizes: Sequence[int], q: Strided, k: Strided, v: Strided, masks: Masks,
    scale: float, dropout: float, keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return o ``(images * queries, heads * d)``, and lse and low of `attention_forward`."""
    batch, heads, _, queries, _, _, d = sizes
    like: Tensor = q[0]  # type: ignore[assignment]
    if runs_triton(like) and 0 not in (batch, queries, sizes[4]):
        o = like.new_empty(batch * queries, heads * d)
        lse, low = new_kept(o, (batch, heads, queries)) if keep else (None, None)
        launch_forward(sizes, (q, k, v, ABSENT, ABSENT), masks, scale, dropout, o, lse, low)
        return o, lse, low
    q4, k4, v4 = by_head(sizes, q, k, v)
    o, *_ = attention_forward(q4, k4, v4, None, None, *masks, scale=scale, dropout=dropout)
    return o.transpose(1, 2).reshape(batch * queries, heads * d), None, None


def rows_backward(
    sizes: Sequence[int], do: Strided, kept: Kept, q: Strided, k: Strided, v: Strided, masks: Masks,
    scale: float, dropout: float, dq: Strided, dk: Strided, dv: Strided,
) -> None:  # fmt: skip
    """Fill the gradients dq, and dk and dv, if they are there.

    kept: what `rows_forward` has returned. dk and dv have the same strides.
    """
    batch, queries, keys = sizes[0], sizes[3], sizes[4]
    like: Tensor = q[0]  # type: ignore[assignment]
    if runs_triton(like) and 0 not in (batch, queries, keys):
        sources, targets = (q, k, v, ABSENT, ABSENT), (dq, dk, dv, ABSENT, ABSENT)
        o, lse, low = kept
        row = (queries * sizes[1] * sizes[6], sizes[6], sizes[1] * sizes[6])
        launch_backward(
            sizes, do, ((o, *row), lse, (low, *row)), sources, masks, scale, dropout, targets
        )
        return
    into = by_head(sizes, dq, dk, dv)
    do4, q4, k4, v4 = by_head(sizes, do, q, k, v)
    attention_backward(
        do4, q4, k4, v4, None, None, *masks, scale=scale, dropout=dropout,
        want_q=dq[0] is not None, want_kv=dk[0] is not None, want_kv2=False,
        into=(into[0], into[1], into[2]),
    )  # fmt: skip


def by_head(sizes: Sequence[int], *tensors: Strided) -> list[Tensor]:
    """Views ``(images, heads, tokens, d)``; of the last two tensors the tokens are the keys.

    None for an absent tensor.
    """
    batch, heads, _, queries, keys, _, d = sizes
    views = []
    for i, (x, image, head, token) in enumerate(tensors):
        tokens = keys if i >= len(tensors) - 2 else queries
        views.append(
            x if x is None else x.as_strided(
                (batch, heads, tokens, d), (image, head, token, 1), x.storage_offset()
            )
        )  # fmt: skip
    return views  # type: ignore[return-value]
