"""How many blocks of a compiled kernel a multiprocessor holds, and how a grid fills the GPU.

Arithmetic on published limits (CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability", and the units in which registers and shared memory are given out, as in NVIDIA's
occupancy calculator); nothing here is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

REGISTER_UNIT = 256  # a warp's registers are given out in these
RESERVED_SHARED_BYTES = 1024  # of a block, by CUDA


@dataclass(frozen=True)
class Multiprocessor:
    """What one of them holds; ``count`` of them on the GPU that stands for its generation."""

    count: int
    shared_bytes: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


GPUS = {
    "sm_80": Multiprocessor(108, 164 * 1024),  # A100
    "sm_90": Multiprocessor(132, 228 * 1024),  # H100, H200
    "sm_100": Multiprocessor(148, 228 * 1024),  # B200
}


@dataclass(frozen=True)
class Occupancy:
    """``share`` of the warps a multiprocessor could hold, and what limits them; ``waves`` of
    blocks over the GPU, and the ``tail``: the share of the last wave's time, and of all, in use."""

    blocks: int
    share: float
    limit: str
    waves: float
    tail: float


def occupancy(arch: str, registers: int, shared_bytes: int, warps: int, grid: int) -> Occupancy:
    """Of a kernel with this many registers a thread, bytes of shared memory and warps a block.

    Raises:
        KeyError: the limits of ``arch`` are not known here.
        ValueError: a multiprocessor holds no such block.
    """
    gpu = GPUS[arch]
    of_a_warp = math.ceil(registers * 32 / REGISTER_UNIT) * REGISTER_UNIT
    fits = {
        "registers": gpu.registers // (of_a_warp * warps) if registers else gpu.blocks,
        "shared memory": gpu.shared_bytes // (shared_bytes + RESERVED_SHARED_BYTES),
        "warps": gpu.warps // warps,
        "blocks": gpu.blocks,
    }
    limit = min(fits, key=lambda name: fits[name])
    blocks = fits[limit]
    if blocks == 0:
        raise ValueError(f"{limit}: no block of this kernel fits on {arch}")
    waves = grid / (blocks * gpu.count)
    # With less than one wave, blocks spread over the multiprocessors first.
    tail = waves / math.ceil(waves) if waves > 1 else min(grid / gpu.count, 1.0)
    return Occupancy(blocks, blocks * warps / gpu.warps, limit, waves, tail)
