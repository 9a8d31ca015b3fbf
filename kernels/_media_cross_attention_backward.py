"""Backward of `media_cross_attention`, deterministic: no atomics, each sum has one fixed order.

In 16 bits the forward has kept the log-sum-exp of each row and its result with a 16-bit remainder.
`media_query_gradient_kernel` computes dq, and stores what `media_key_gradient_kernel` needs: the
mean of dp of each row and the normed queries. fp32 has kernels
of its own, see `_media_cross_attention_backward_fp32`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._attention_arguments import Kept, by_strides
from ._attention_gradient_tiles import WIDE_STRIDE
from ._attention_shares import add_shares_kernel, row_splits, summing_programs
from ._launcher import capability
from ._media_attention_tilings import key_tiling, query_tiling, skips_media
from ._media_cross_attention_backward_fp32 import launch_backward_fp32
from ._media_key_gradient import media_key_gradient_kernel
from ._media_query_gradient import media_query_gradient_kernel
from ._sizes import cdiv
from ._sum_shares import sum_shares


def launch_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, q_norm: Tensor | None,
    tokens_per_media: int, attend: str, unattended: str, scale: float, eps: float, kept: Kept,
    dq: Tensor | None, dkv: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """Fill those of dq and dkv that are not None; return the gradient of q_norm or None.

    kept: what `media_attention_forward` has returned. dkv: dk and dv, one after the other. All
    gradients lie in memory as ``(batch, tokens, heads, d)``.
    """
    dk, dv = (None, None) if dkv is None else dkv
    if q.dtype is torch.float32:
        launch_backward_fp32(
            do, q, k, v, index, tokens_per_media, attend, unattended, scale, dq, dk, dv
        )  # fmt: skip
        return None
    batch, heads, queries, d = q.shape
    kv_heads, keys = k.shape[1:3]
    media, group = keys // tokens_per_media, heads // kv_heads
    rows, count = group * queries, batch * heads * queries
    gpu = capability(q)
    tiles = query_tiling(gpu, rows, d, q.dtype)
    programs = batch * kv_heads * cdiv(rows, tiles.block_m)
    stats = normed = shares = dq_norm = None
    if dk is not None:
        stats = q.new_empty(count, 2, dtype=torch.float32)
    if q_norm is not None and dk is not None:
        normed = q.new_empty(batch, heads, queries, d)
    if q_norm is not None and dq is not None:
        dq_norm = torch.empty_like(q_norm)
        shares = q.new_empty(programs, d, dtype=torch.float32)
    outer, (o, lse, low) = by_strides(do), kept
    sources = (*by_strides(k), *by_strides(v))
    wide = max(x.stride(2) for x in (do, q, k, v)) > WIDE_STRIDE
    media_query_gradient_kernel(
        lambda blocks: (programs,),
        *by_strides(q), *outer, o, low, lse, stats, *sources, index, q_norm, normed,
        dq, shares,
        kv_heads, group, queries, rows, media, tokens_per_media, scale, eps,
        attend, unattended, skips_media(q, attend, tokens_per_media), wide,
        int(tiles.block_m >= 64), d, tiles.widths[0], tiles.block_m,
        config=tiles.config,
    )  # fmt: skip
    if dkv is not None and dk is not None:
        tiles = key_tiling(gpu, tokens_per_media, d)
        pairs = batch * kv_heads * media
        splits = row_splits(pairs * cdiv(tokens_per_media, 64), rows // media)
        size, into = dk.numel(), (dk, dv)
        if splits > 1:
            parts = q.new_empty(splits, 2, size, dtype=torch.float32)
            into = (parts, parts.select(1, 1))

        def grid(blocks: dict[str, int]) -> tuple[int, ...]:
            return (pairs * cdiv(tokens_per_media, blocks["BLOCK_N"]) * splits,)

        media_key_gradient_kernel(
            grid,
            *by_strides(q if normed is None else normed), *outer, stats, *sources, index,
            *into, *dk.stride()[:3], 2 * size,
            kv_heads, group, queries, media, tokens_per_media, splits, scale,
            attend, unattended, wide, d, tiles.widths[0], tiles.block_m,
            config=tiles.config,
        )  # fmt: skip
        if splits > 1:
            add_shares_kernel(
                lambda blocks: (summing_programs(2 * size),), parts, dkv, 2 * size, splits
            )
    sum_shares(shares, dq_norm)
    return dq_norm
