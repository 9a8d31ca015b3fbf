"""`media_cross_attention` on a CPU, from ATen's matrix products and softmax.

The tokens of a sample that attend to the same media form a group, which reads the keys of those
media only. Consecutive tokens, such as the text between two images, are sliced and not gathered.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._cross_attention_aten import by_tokens, softmax_gradient
from ._media_mask import media_seen

Where = slice | Tensor  # positions along an axis


def forward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor,
    tokens_per_media: int, attend: str, unattended: str, scale: float,
) -> Tensor:  # fmt: skip
    """Return ``(batch, heads, queries, d)``."""
    o = by_tokens(q)
    for sample, tokens, keys, uniform in _groups_of_equal_index(
        index, k.shape[2] // tokens_per_media, tokens_per_media, attend, unattended
    ):
        if keys is None:
            o[sample, :, tokens] = 0
            continue
        p = _probabilities(q[sample, :, tokens], k[sample, :, keys], scale, uniform)
        found = torch.bmm(p, v[sample, :, keys].float())
        o[sample, :, tokens] = found.view(q.shape[1], -1, q.shape[3]).to(o.dtype)
    return o


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor,
    tokens_per_media: int, attend: str, unattended: str, scale: float,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None,
) -> None:  # fmt: skip
    """Fill those of dq, dk and dv that are not None."""
    media, kv_heads, d = k.shape[2] // tokens_per_media, k.shape[1], q.shape[3]
    # Several groups may attend to one medium; their shares are summed in fp32.
    sums = [None if g is None else torch.zeros_like(g, dtype=torch.float32) for g in (dk, dv)]
    for sample, tokens, keys, uniform in _groups_of_equal_index(
        index, media, tokens_per_media, attend, unattended
    ):  # fmt: skip
        if keys is None:
            if dq is not None:
                dq[sample, :, tokens] = 0
            continue
        q_here, k_here = q[sample, :, tokens], k[sample, :, keys].float()
        rows = q_here.reshape(kv_heads, -1, d).float()
        do_here = do[sample, :, tokens].reshape(kv_heads, -1, d).float()
        p = _probabilities(q_here, k_here, scale, uniform)
        if sums[1] is not None:
            _add(sums[1][sample], keys, torch.bmm(p.transpose(1, 2), do_here))
        if uniform:  # the weights are equal and the scores get no gradient
            if dq is not None:
                dq[sample, :, tokens] = 0
            continue
        dp = torch.bmm(do_here, v[sample, :, keys].float().transpose(1, 2))
        ds = softmax_gradient(dp, p).mul_(scale)
        if dq is not None:
            dq[sample, :, tokens] = torch.bmm(ds, k_here).view(*q_here.shape).to(dq.dtype)
        if sums[0] is not None:
            _add(sums[0][sample], keys, torch.bmm(ds.transpose(1, 2), rows))
    for gradient, found in zip((dk, dv), sums, strict=True):
        if gradient is not None and found is not None:
            gradient.copy_(found)


def _groups_of_equal_index(
    index: Tensor, media: int, tokens_per_media: int, attend: str, unattended: str
) -> Iterator[tuple[int, Where, Where | None, bool]]:
    """Yield groups: sample, tokens, their keys or None, and whether all keys weigh the same."""
    for sample, row in enumerate(index):
        for value in row.unique():
            tokens = _positions(row == value)
            seen = media_seen(value, media, attend)
            has_no_media = not bool(seen.any())
            if has_no_media and unattended == "zero":
                yield sample, tokens, None, False
                continue
            chosen = _positions(seen | has_no_media, tokens_per_media)
            yield sample, tokens, chosen, has_no_media and unattended == "uniform"


def _positions(chosen: Tensor, repeat: int = 1) -> Where:
    """The positions where a mask is true, as a slice if they are consecutive.

    Each entry of the mask stands for ``repeat`` consecutive positions.
    """
    at = chosen.nonzero().squeeze(1)
    first, count = int(at[0]), len(at)
    if int(at[-1]) - first + 1 == count:
        return slice(first * repeat, (first + count) * repeat)
    return (at.unsqueeze(1) * repeat + torch.arange(repeat)).flatten()


def _probabilities(q: Tensor, k: Tensor, scale: float, uniform: bool) -> Tensor:
    """The probabilities ``(kv_heads, rows, keys)`` of one group, in fp32."""
    rows = q.reshape(k.shape[0], -1, q.shape[2]).float()
    if uniform:
        return rows.new_full((*rows.shape[:2], k.shape[1]), 1 / k.shape[1])
    s = torch.bmm(rows, k.float().transpose(1, 2)).mul_(scale)
    p = torch.softmax(s, -1)
    return torch.ops.aten._safe_softmax(s, -1) if p[..., 0].isnan().any() else p


def _add(total: Tensor, at: Where, found: Tensor) -> None:
    """Add to the tokens of ``total (kv_heads, tokens, d)`` at these positions."""
    if isinstance(at, slice):
        total[:, at] += found
    else:
        total.index_add_(1, at, found)
