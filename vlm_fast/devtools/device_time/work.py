"""What one program of a kernel executes and moves."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from vlm_fast.devtools.device_time import ttir

WGMMA_ROWS = 64  # on sm_90 four warps share one instruction of a product with so many rows
Pointers = frozenset[str]


SUMMED = (
    "instructions", "steps", "loads", "looped_loads", "shared", "wide_flops", "narrow_flops",
)  # fmt: skip


@dataclass
class Work:
    """What one program executes, on average over programs.

    Attributes:
        instructions: of one thread.
        steps: products and reductions, for which all threads of a program wait.
        loads, looped_loads: loads, and of these the ones in loops.
        shared: bytes that products move through shared memory.
        wide_flops, narrow_flops: of products on tiles for wgmma, and on smaller ones.
        moved: bytes loaded, and bytes stored, by the arguments that hold the pointer.
    """

    instructions: float = 0.0
    steps: float = 0.0
    loads: float = 0.0
    looped_loads: float = 0.0
    shared: float = 0.0
    wide_flops: float = 0.0
    narrow_flops: float = 0.0
    moved: Counter[tuple[str, Pointers]] = field(default_factory=Counter)

    def add(self, other: Work, times: float = 1.0) -> None:
        for name in SUMMED:
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for key, size in other.moved.items():
            self.moved[key] += times * size  # type: ignore[assignment]

    def add_product(self, line: str, warps: int) -> None:
        """Add a ``tt.dot``, given the line with the types of its factors."""
        (rows, inner), (_, columns) = ttir.shapes(line)[:2]
        wide = rows >= WGMMA_ROWS and warps >= 4
        if wide:
            self.wide_flops += 2 * rows * inner * columns
        else:
            self.narrow_flops += 2 * rows * inner * columns
        readers = max(warps // 4, 1) if wide else warps  # of the second factor
        factors = 2 * rows * inner + (1 + readers) * inner * columns  # written once, then read
        self.shared += ttir.item_bytes(line, 0) * factors
        self.steps += 1
