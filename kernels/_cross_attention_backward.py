"""Backward of `cross_attention`, deterministic: no atomics, each sum has one fixed order.

In 16 bits the forward has kept the log-sum-exp of each row and its result with a 16-bit remainder,
and backward reads the keys once. If one tile holds all rows of a key head,
`query_gradient_kernel` yields every gradient. Otherwise it yields dq, and
`key_value_gradient_kernel` dk and dv. Programs that share the keys of a row write fp32 shares of
dq, which are added in order. fp32 has kernels of its own, see `_cross_attention_backward_fp32`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._attention_arguments import KeptByStrides, Masks, Strided, mask_arguments
from ._attention_gradient_tiles import WIDE_STRIDE
from ._attention_shares import add_shares_kernel, gradient_splits, summing_programs
from ._attention_tilings import tiling
from ._cross_attention_backward_fp32 import launch_backward_fp32
from ._key_value_gradient import key_value_gradient_kernel
from ._launcher import capability
from ._query_gradient import query_gradient_kernel
from ._sizes import cdiv

NOT_WRITTEN = (None, None, 0, 0, 0) * 2


def launch_backward(
    sizes: Sequence[int],
    do: Strided,
    kept: KeptByStrides,
    sources: Sequence[Strided],
    masks: Masks,
    scale: float,
    dropout: float,
    targets: Sequence[Strided],
) -> None:
    """Fill those of the targets dq, dk, dv, dk2 and dv2 that are there.

    sizes: see `call_sizes`. kept: see `kept_by_strides`. sources: q, k, v, k2, v2. Of dk and dv,
    and of dk2 and dv2, the strides are the same. See `attention_backward`.
    """
    q, k, v, k2, v2 = sources
    dq, dk, dv, dk2, dv2 = targets
    like: Tensor = q[0]  # type: ignore[assignment]
    if dq[0] is None and dk[0] is None and dk2[0] is None:
        return
    if like.dtype is torch.float32:
        launch_backward_fp32(sizes, do, sources, masks, scale, dropout, targets)
        return
    o, lse, low = kept
    batch, heads, kv_heads, queries, keys, keys2, d = sizes
    group, count = heads // kv_heads, batch * heads * queries
    rows = group * queries
    scored = mask_arguments(masks, dropout, (batch, heads, queries, keys + keys2))
    bias, seed = scored[0], scored[8]
    tiles = tiling(capability(like), rows, d, (bias is not None) + (seed is not None))
    wide = is_wide(q, do, k, v, k2, v2, dk, dk2)
    written = (dk[0], dv[0], *dk[1:], dk2[0], dv2[0], *dk2[1:])
    later = dk[0] is not None and not tiles.one_kernel
    programs = batch * kv_heads * cdiv(rows, tiles.block_m)
    splits, splits2 = gradient_splits(programs, keys, keys2, tiles.held)
    by_tokens = (queries * heads * d, d, heads * d)
    if dq[1:] != by_tokens and keys2 == 0:
        splits = 1  # shares are added for such a dq only
    size, shares = 0, None
    into = (*dq, 0)
    if dq[0] is not None and splits + splits2 > 1:
        size = count * d
        shares = like.new_empty(splits + splits2, size, dtype=torch.float32)
        into = (shares, *by_tokens, size)
    delta = like.new_empty(count, dtype=torch.float32) if later else None
    query_gradient_kernel(
        lambda blocks: (programs * (splits + splits2),),
        *q, *do, *o, *low, lse, delta, *k, *v, *k2, *v2, *scored, *into,
        *(NOT_WRITTEN if later else written),
        kv_heads, group, queries, rows, keys, keys2, count, splits, splits2, scale,
        d, *tiles.widths, tiles.block_m,
        group == 1, rows % tiles.block_m == 0, tiles.keys_axis, wide,
        config=tiles.config,
    )  # fmt: skip
    adding = summing_programs(size)
    if later:
        pairs = batch * kv_heads

        def grid(blocks: dict[str, int]) -> tuple[int, ...]:
            return (pairs * key_tiles(keys, keys2, blocks["BLOCK_N"]) + adding,)

        key_value_gradient_kernel(
            grid,
            *q, *do, lse, delta, *k, *v, *k2, *v2, *scored, *written,
            shares, dq[0] if size else None, size, splits + splits2,
            kv_heads, group, queries, keys, keys2, pairs, scale,
            d, *tiles.widths, tiles.key_block_m, queries % tiles.key_block_m == 0, wide,
            config=tiles.key_config,
        )  # fmt: skip
    elif size:
        add_shares_kernel(lambda blocks: (adding,), shares, dq[0], size, splits + splits2)


def key_tiles(keys: int, keys2: int, block: int) -> int:
    """The number of tiles of the keys of both sources."""
    return cdiv(keys, block) + cdiv(keys2, block)


def is_wide(*tensors: Strided) -> bool:
    """Whether tokens are so far apart that the offsets in a tile do not fit in int32."""
    return max([x[3] for x in tensors]) > WIDE_STRIDE
