"""The sizes of media attention's tiles, by dtype, number of rows, head size and GPU.

They are chosen from compiled code: no spills, then the fewest instructions for a score.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ._attention_tilings import head_parts
from ._launcher import Config
from ._sizes import next_power_of_2

BY_16 = Config({"BLOCK_N": 16}, num_warps=4, num_stages=1)
BY_32 = Config({"BLOCK_N": 32}, num_warps=4, num_stages=2)
BY_32_WARPS_8 = Config({"BLOCK_N": 32}, num_warps=8, num_stages=2)
BY_64 = Config({"BLOCK_N": 64}, num_warps=4, num_stages=2)
BY_64_ALONE = Config({"BLOCK_N": 64}, num_warps=4, num_stages=1)
BY_64_ALONE_WARPS_8 = Config({"BLOCK_N": 64}, num_warps=8, num_stages=1)
BY_64_WARPS_8 = Config({"BLOCK_N": 64}, num_warps=8, num_stages=2)
BY_128_WARPS_8 = Config({"BLOCK_N": 128}, num_warps=8, num_stages=2)
# Of the kernel whose tiles have the keys of a medium.
ALONE = Config({}, num_warps=4, num_stages=1)
AHEAD = Config({}, num_warps=4, num_stages=3)
ALONE_WARPS_8 = Config({}, num_warps=8, num_stages=1)
FORWARD = (BY_16, BY_32, BY_32_WARPS_8, BY_64, BY_64_WARPS_8)
OF_QUERIES = (BY_32, BY_32_WARPS_8, BY_64, BY_64_WARPS_8)
OF_KEYS = (
    BY_32, BY_64, BY_64_ALONE, BY_64_WARPS_8, BY_64_ALONE_WARPS_8, BY_128_WARPS_8
)  # fmt: skip
OF_ALL = (ALONE, AHEAD, ALONE_WARPS_8)


class Tiling(NamedTuple):
    """The tiles of a kernel.

    Attributes:
        block_m: rows in a tile.
        config: number of the kernel's config, which says how many keys are in a tile.
        widths: of the two parts of a head.
        held: programs that a multiprocessor of an H200 holds.
        keys: the axis of the keys in a tile of scores.
    """

    block_m: int
    config: int
    widths: tuple[int, int]
    held: int = 1
    keys: int = 0


def padded(d: int) -> tuple[int, int]:
    """The widths of a head of size d in one part."""
    return max(16, next_power_of_2(d)), 0


@functools.cache
def forward_tiling(capability: int, rows: int, d: int, dtype: torch.dtype) -> Tiling:
    """The tiles of `media_cross_attention_kernel` for so many rows of a key head.

    Args:
        capability: of the GPU, 10 times the major and the minor number.
        rows: the queries of all heads that share a key head.
        d: the head size.
        dtype: of the queries. fp32 products run on scalar units and need more registers.
    """
    if dtype is torch.float32:
        return Tiling(16, FORWARD.index(BY_16), head_parts(d))
    if rows <= 16:
        return Tiling(16, FORWARD.index(BY_32), padded(d), 3)
    if d <= 64:
        return Tiling(64, FORWARD.index(BY_32 if capability < 90 else BY_64), padded(d), 3)
    if rows < 128:
        return Tiling(64, FORWARD.index(BY_32_WARPS_8), padded(d))
    return Tiling(128, FORWARD.index(BY_64_WARPS_8), padded(d))


@functools.cache
def query_tiling(capability: int, rows: int, d: int, dtype: torch.dtype) -> Tiling:
    """The tiles of `media_query_gradient_kernel`, in 16 bits; see `forward_tiling`."""
    if rows <= 16:
        return Tiling(16, OF_QUERIES.index(BY_32), padded(d))
    if d <= 64:
        return Tiling(64, OF_QUERIES.index(BY_32 if capability < 90 else BY_64), padded(d))
    if capability // 10 != 9:
        return Tiling(64, OF_QUERIES.index(BY_32_WARPS_8), padded(d))
    return Tiling(
        64, OF_QUERIES.index(BY_64 if dtype is torch.bfloat16 else BY_64_WARPS_8), padded(d)
    )


@functools.cache
def key_tiling(capability: int, tokens_per_media: int, d: int) -> Tiling:
    """The tiles of `media_key_gradient_kernel`, in 16 bits; see `forward_tiling`.

    Hopper's tiles ``[rows, keys]`` have one stage: with more, ptxas runs their products one after
    the other, or spills. With several tiles of keys, loads ahead are worth more.
    """
    if capability < 90:
        return Tiling(32, OF_KEYS.index(BY_32), padded(d))
    if capability >= 100:
        return Tiling(64, OF_KEYS.index(BY_64 if d <= 64 else BY_64_WARPS_8), padded(d), keys=1)
    if d <= 64:
        return Tiling(64, OF_KEYS.index(BY_64_ALONE), padded(d), keys=1)
    if tokens_per_media <= 64:
        return Tiling(64, OF_KEYS.index(BY_64_ALONE_WARPS_8), padded(d), keys=1)
    return Tiling(32, OF_KEYS.index(BY_128_WARPS_8), padded(d))


@functools.cache
def gradient_tiling(capability: int) -> Tiling:
    """The tiles of `media_gradient_kernel`; see `forward_tiling`."""
    if capability < 90:
        return Tiling(32, OF_ALL.index(ALONE), padded(64))
    config = AHEAD if capability < 100 else ALONE_WARPS_8
    return Tiling(64, OF_ALL.index(config), padded(64))


def sees_one_tile(
    q: Tensor, k: Tensor, q_norm: Tensor | None, tokens_per_media: int, attend: str, unattended: str
) -> bool:
    """Whether `media_gradient_kernel` computes all gradients, from nothing but the log-sum-exp.

    Each row sees one medium at most, whose keys fit in a tile, and the rows that share keys are
    those of one head, so that the tokens that see a medium follow each other in memory.
    """
    return (
        attend == "latest" and unattended == "zero" and q_norm is None
        and tokens_per_media == 64 and q.shape[3] == 64 and q.shape[1] == k.shape[1]
        and q.dtype is not torch.float32
    )  # fmt: skip


def kept_bytes(
    q: Tensor, k: Tensor, q_norm: Tensor | None, tokens_per_media: int, attend: str, unattended: str
) -> int:
    """Bytes that backward reads of what the forward has kept; in fp32 those of o."""
    size = q.numel() * q.element_size()
    if q.dtype is torch.float32:
        return size
    lse = 4 * (q.numel() // max(q.shape[3], 1))
    one_tile = sees_one_tile(q, k, q_norm, tokens_per_media, attend, unattended)
    return lse if one_tile else 2 * size + lse


def skips_media(q: Tensor, attend: str, tokens_per_media: int) -> bool:
    """Whether kernels loop over media, of which they skip some, and within over their tiles.

    Otherwise they loop over the tiles of a range of media, so that even one tile of each medium is
    loaded ahead. In fp32 two loops would spill registers.
    """
    return attend == "listed" and tokens_per_media > 64 and q.dtype is not torch.float32
