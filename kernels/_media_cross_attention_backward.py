"""Backward of `media_cross_attention`, deterministic: no atomics, each sum has one fixed order.

In 16 bits the forward has kept the log-sum-exp of each row. Where a row sees one tile of keys,
`media_gradient_kernel` computes all gradients. Else the forward has also kept its result with a
16-bit remainder: `media_query_gradient_kernel` computes dq, and stores what
`media_key_gradient_kernel` needs, the mean of dp of each row and the normed queries. fp32 has
kernels of its own, see `_media_cross_attention_backward_fp32`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._attention_arguments import Kept, by_strides
from ._attention_gradient_tiles import WIDE_STRIDE
from ._attention_shares import add_shares_kernel, row_splits, summing_programs
from ._attention_tiles import strides
from ._launcher import capability
from ._media_attention_tilings import (
    gradient_tiling,
    key_tiling,
    query_tiling,
    sees_one_tile,
    skips_media,
)
from ._media_cross_attention_backward_fp32 import launch_backward_fp32
from ._media_gradient import media_gradient_kernel
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
    if sees_one_tile(q, k, q_norm, tokens_per_media, attend, unattended):
        _launch_for_one_tile(do, q, k, v, index, tokens_per_media, scale, kept[1], dq, dk, dv, dkv)
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
        parts, into = _shares(dk, dv, splits)

        def grid(blocks: dict[str, int]) -> tuple[int, ...]:
            return (pairs * cdiv(tokens_per_media, blocks["BLOCK_N"]) * splits,)

        media_key_gradient_kernel(
            grid,
            *by_strides(q if normed is None else normed), *outer, stats, *sources, index,
            *into, *dk.stride()[:3], dkv.numel(),
            kv_heads, group, queries, media, tokens_per_media, splits, scale,
            attend, unattended, wide, tiles.keys, d, tiles.widths[0], tiles.block_m,
            config=tiles.config,
        )  # fmt: skip
        _add_shares(parts, dkv)
    sum_shares(shares, dq_norm)
    return dq_norm


def _launch_for_one_tile(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, tokens_per_media: int,
    scale: float, lse: Tensor | None, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None,
    dkv: Tensor | None,
) -> None:  # fmt: skip
    """Fill dq and dkv, which is dk and dv, where `sees_one_tile` holds; see `launch_backward`."""
    batch, heads, queries, d = q.shape
    media = k.shape[2] // tokens_per_media
    tiles = gradient_tiling(capability(q))
    pairs = batch * heads * media
    splits = row_splits(pairs, queries // media)
    shares, into = _shares(dk, dv, splits)
    media_gradient_kernel(
        lambda blocks: (pairs * splits,),
        *by_strides(q), *by_strides(do), lse, *by_strides(k), *by_strides(v), index,
        *by_strides(dq), *into, *strides(dk),
        0 if dkv is None else dkv.numel(), heads, queries, media, splits, scale,
        max(x.stride(2) for x in (do, q, k, v)) > WIDE_STRIDE, d, tiles.block_m, tokens_per_media,
        config=tiles.config,
    )  # fmt: skip
    _add_shares(shares, dkv)


def _shares(
    dk: Tensor | None, dv: Tensor | None, splits: int
) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None]]:
    """Memory for the shares of dk and dv, if there are several, and where to store dk and dv."""
    if dk is None or splits == 1:
        return None, (dk, dv)
    shares = dk.new_empty(splits, 2, dk.numel(), dtype=torch.float32)
    return shares, (shares, shares.select(1, 1))


def _add_shares(shares: Tensor | None, dkv: Tensor | None) -> None:
    """Fill dkv with the sum of its shares, if there are several."""
    if shares is not None and dkv is not None:
        size = dkv.numel()
        add_shares_kernel(
            lambda blocks: (summing_programs(size),), shares, dkv, size, shares.shape[0]
        )
