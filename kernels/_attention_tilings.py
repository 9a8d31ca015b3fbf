"""The sizes of attention's tiles, by dtype, number of rows, head size and GPU.

They are chosen from compiled code: no spills, then the most programs on a multiprocessor.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ._sizes import next_power_of_2


@functools.cache
def head_parts(d: int) -> tuple[int, int]:
    """The widths D1 and D2 of the two parts of a head of size d; D2 is 0 for one part."""
    first = max(16, 1 << (d.bit_length() - 1))
    return first, 0 if d <= first else max(16, next_power_of_2(d - first))


@functools.cache
def tile_divisor(dtype: torch.dtype, d: int) -> int:
    """The divisor of BLOCK_N, which is the number of keys in a tile for 64 columns of 16 bits.

    fp32 products run on scalar units and need more registers, so their tiles have
    a quarter of the keys.
    """
    columns = next_power_of_2(sum(head_parts(d)))
    return max(1, columns // 64) * (4 if dtype == torch.float32 else 1)


def row_block(q: Tensor, rows: int) -> int:
    """The number of rows in a tile. With 64, registers spill on some GPU."""
    return 16 if rows <= 16 or q.dtype == torch.float32 else 32


# Numbers of the configs of `cross_attention_kernel`.
FORWARD_16, FORWARD_32, FORWARD_64, FORWARD_64_STAGES_3 = range(4)
FORWARD_32_OF_168, FORWARD_32_OF_255 = 4, 5  # registers
# And of those of `query_gradient_kernel`.
KEYS_32, KEYS_64, KEYS_64_WARPS_8, KEYS_32_WARPS_8 = range(4)
# And of those of `key_value_gradient_kernel`.
BY_32_KEYS, BY_64_KEYS, BY_128_KEYS, BY_128_KEYS_STAGED = range(4)


class ForwardTiling(NamedTuple):
    """The tiles of `cross_attention_kernel`.

    Attributes:
        block_m: rows in a tile.
        config: of the kernel.
        keys_axis: of the tiles.
        held: programs that a multiprocessor holds.
        widths: of the two parts of a head.
    """

    block_m: int
    config: int
    keys_axis: int
    held: int
    widths: tuple[int, int]


@functools.cache
def forward_tiling(
    capability: int, dtype: torch.dtype, rows: int, d: int, plain: bool, bias: bool = False
) -> ForwardTiling:
    """The tiles of the forward for so many rows of a key head.

    From Hopper on the tensor cores take 64 rows at once, and keep the probabilities in registers;
    rows that do not exist cost less than to exchange probabilities between warps. Datacenter
    Blackwell's copy a tile between two memories instead, so it gets the tiles of older GPUs.

    Args:
        capability: of the GPU, 10 times the major and the minor number.
        dtype: of the queries.
        rows: the queries of all heads that share a key head.
        d: the head size.
        plain: whether there is neither bias nor dropout, and the scale is positive.
        bias: whether there is a bias.
    """
    widths = head_parts(d)
    if dtype == torch.float32:
        return ForwardTiling(16, FORWARD_16, 0, 1, widths)
    if not plain:
        return _scored_tiling(90 <= capability < 100, rows, d, bias)
    if 90 <= capability < 100:
        if d > 96:
            return ForwardTiling(64, FORWARD_64, 1, 2, widths)
        return ForwardTiling(64, FORWARD_64_STAGES_3, 1, 3 if d <= 64 else 2, widths)
    if rows > 32 and capability < 90:
        return ForwardTiling(64, FORWARD_32, 1, 2, widths)
    return ForwardTiling(32, FORWARD_32 if d > 64 else FORWARD_64, 1, 2, widths)


def _scored_tiling(hopper: bool, rows: int, d: int, bias: bool) -> ForwardTiling:
    """The tiles of the forward with bias or dropout, which take registers."""
    if hopper:  # two parts take more registers and instructions than padding
        widths = head_parts(d) if d <= 64 else (128, 0)
        return ForwardTiling(16 if rows <= 16 else 32, FORWARD_32, 0, 1, widths)
    heavy = bias and d > 64
    if rows <= 16 and not heavy:
        return ForwardTiling(16, FORWARD_32_OF_168, 0, 1, head_parts(d))
    return ForwardTiling(16 if heavy else 32, FORWARD_32_OF_255, 0, 1, head_parts(d))


class Tiling(NamedTuple):
    """The tiles of a call of backward.

    Attributes:
        block_m: rows in a tile of `query_gradient_kernel`.
        config: of `query_gradient_kernel`.
        held: programs of it that a multiprocessor holds.
        keys_axis: of its tiles.
        widths: of the two parts of a head, for both kernels.
        one_kernel: whether it yields every gradient, because one tile holds all rows of a key head.
        key_block_m: rows in a tile of `key_value_gradient_kernel`.
        key_config: of `key_value_gradient_kernel`.
    """

    block_m: int
    config: int
    held: int
    keys_axis: int
    widths: tuple[int, int]
    one_kernel: bool
    key_block_m: int = 0
    key_config: int = 0


@functools.cache
def tiling(capability: int, rows: int, d: int, heavy: int) -> Tiling:
    """The tiles of backward for so many rows of a key head.

    Args:
        capability: of the GPU, 10 times the major and the minor number.
        rows: the queries of all heads that share a key head.
        d: the head size.
        heavy: how many there are of bias and dropout, which take registers.
    """
    before_hopper, wide = capability < 90, d > 64
    block_m = max(16, next_power_of_2(rows))
    one_kernel = block_m <= (64 if wide or before_hopper else 128)
    if not one_kernel:
        block_m = 64
    widths = head_parts(d)
    # Two parts take more registers than padding.
    if wide and (before_hopper or heavy or d > (80 if block_m <= 32 else 96)):
        widths = (128, 0)
    key_block_m, keys = _for_keys(before_hopper, d, heavy)
    rows_config, held = _for_rows(before_hopper, block_m, d, heavy, one_kernel)
    axis = 1 if block_m >= 64 else 0
    return Tiling(block_m, rows_config, held, axis, widths, one_kernel, key_block_m, keys)


def _for_rows(
    before_hopper: bool, block_m: int, d: int, heavy: int, one_kernel: bool
) -> tuple[int, int]:
    """The config of `query_gradient_kernel` and how many of its programs are held."""
    if (d > 64 and (before_hopper or heavy)) or (before_hopper and block_m == 64 and heavy == 2):
        return KEYS_32_WARPS_8, 1
    if block_m == 128:
        return (KEYS_32_WARPS_8 if heavy else KEYS_64_WARPS_8), 1
    if before_hopper:
        return KEYS_32, 2
    if heavy:
        return (KEYS_64 if block_m <= 32 and heavy == 1 else KEYS_32), 2
    if (d > 96 and one_kernel) or (d > 80 and block_m <= 32):
        return KEYS_64_WARPS_8, 1
    return KEYS_64, 3 if d <= 64 and (block_m <= 32 or not one_kernel) else 2


def _for_keys(before_hopper: bool, d: int, heavy: int) -> tuple[int, int]:
    """The rows in a tile of `key_value_gradient_kernel`, and its config."""
    if before_hopper:
        return 32, BY_32_KEYS
    if heavy:
        return 32 if d <= 64 else 16, BY_128_KEYS_STAGED
    if d <= 64:
        return 64, BY_128_KEYS
    return 32, BY_64_KEYS if d <= 96 else BY_128_KEYS_STAGED
