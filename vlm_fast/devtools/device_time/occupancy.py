"""How many blocks of a compiled kernel a multiprocessor holds.

Arithmetic on published limits: CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability", and the units of allocation in NVIDIA's occupancy calculator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

REGISTER_UNIT = 256  # registers of a warp are allocated in such units
RESERVED_SHARED_BYTES = 1024  # of each block, by CUDA


@dataclass(frozen=True)
class Multiprocessor:
    """What a multiprocessor of an architecture holds, and ``count`` of them on the named GPU."""

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
    """How many blocks of a kernel a multiprocessor holds.

    Attributes:
        blocks: resident at a time.
        share: of the warps that a multiprocessor can hold.
        limit: "registers", "shared memory", "warps" or "blocks".
    """

    blocks: int
    share: float
    limit: str


def occupancy(arch: str, registers: int, shared_bytes: int, warps: int) -> Occupancy:
    """Occupancy of a kernel with these registers a thread, shared bytes and warps a block.

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
    return Occupancy(blocks, blocks * warps / gpu.warps, limit)
