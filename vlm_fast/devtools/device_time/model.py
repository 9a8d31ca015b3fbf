"""Device time from counts: the formulas, whose constants `calibration` fits.

A pass takes ``first`` and the time of its kernels, each with the gap of a launch. A kernel of this
package joins two times: its bytes at ``bandwidth``, and rounds of programs over the
multiprocessors. A round takes ``program`` and joins four:

- latency: the instructions and the steps of one program, one after the other,
- issue: the instructions of all programs on the multiprocessor, at one a cycle and scheduler,
- shared: their bytes through shared memory, at 128 a cycle,
- products: their floating-point operations at a share of the tensor cores' rate.

Times are joined by a norm of them, see `aten_time.longest`, because they overlap in part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from vlm_fast.devtools.device_time import aten_time
from vlm_fast.devtools.device_time.aten_time import (
    CYCLES,
    MULTIPROCESSORS,
    PROGRAM_ORDER,
    Constants,
    longest,
)
from vlm_fast.devtools.device_time.counts import Counts, KernelCounts

SCHEDULERS = 4  # of a multiprocessor
TENSOR_FLOPS = 4096  # of a multiprocessor in a cycle, dense, in 16 bits
SHARED_BYTES = 128  # of a multiprocessor in a cycle
# Constant: first guess, least and largest value of the fit. Times in us, rates in TB/s.
BOUNDS = {
    "first": (1.5, 0.1, 10.0), "launch": (2.5, 0.1, 10.0), "aten_launch": (3.0, 0.1, 10.0),
    "program": (1.5, 0.05, 10.0), "instruction_cycles": (3.0, 1.0, 30.0),
    "step_cycles": (100.0, 5.0, 1500.0), "issue_cycles": (1.2, 0.8, 6.0),
    "shared_cycles": (1.0, 0.5, 10.0), "wide_share": (0.6, 0.2, 0.9),
    "narrow_share": (0.3, 0.1, 0.6), "bandwidth": (4.0, 2.5, 4.3),
    "elementwise_bandwidth": (3.2, 0.5, 4.3), "reduction_bandwidth": (2.0, 0.2, 4.3),
    "index_bandwidth": (1.5, 0.1, 4.3), "product_bandwidth": (2.5, 0.5, 4.3),
    "reduction": (2.0, 0.1, 20.0), "product": (2.0, 0.1, 20.0), "product_share": (0.6, 0.3, 0.74),
    "unaligned": (2.5, 1.0, 20.0),
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Kernels of some passes in columns, with the number of the pass that each belongs to.

    Attributes:
        passes: number of passes.
        ours, aten: a column per attribute of `KernelCounts`; bytes, batch, rows, columns, inner
            size and class of ATen's kernels.
        ours_in, aten_in: numbers of passes.
        unseen: launches of a pass that are not in its counts, such as checks of indices.
    """

    passes: int
    ours: Tensor
    ours_in: Tensor
    aten: Tensor
    aten_in: Tensor
    unseen: Tensor

    @classmethod
    def of(cls, passes: Sequence[Sequence[Counts]], unseen: Sequence[int] | None = None) -> Table:
        ours: list[tuple[float, ...]] = []
        aten: list[tuple[float, ...]] = []
        ours_in, aten_in = [], []
        for i, kernels in enumerate(passes):
            for kernel in kernels:
                if isinstance(kernel, KernelCounts):
                    ours.append(astuple(kernel)[1:])
                    ours_in.append(i)
                else:
                    aten.append(aten_time.columns(kernel))
                    aten_in.append(i)
        return cls(
            len(passes),
            torch.tensor(ours, dtype=torch.float64).reshape(-1, 9).T,
            torch.tensor(ours_in, dtype=torch.long),
            torch.tensor(aten, dtype=torch.float64).reshape(-1, 6).T,
            torch.tensor(aten_in, dtype=torch.long),
            torch.tensor(unseen or [0] * len(passes), dtype=torch.float64),
        )


def round_parts(ours: Tensor, programs: Tensor, c: Constants) -> dict[str, Tensor]:
    """Microseconds of one round of ``programs`` over the GPU, by what they wait for."""
    _, warps, _, _, instructions, steps, shared, wide, narrow = ours
    held = torch.ceil(programs / MULTIPROCESSORS)  # by the busiest multiprocessor
    cycles = {
        "latency": instructions * c["instruction_cycles"] + steps * c["step_cycles"],
        "issue": held * instructions * warps / SCHEDULERS * c["issue_cycles"],
        "shared memory": held * shared / SHARED_BYTES * c["shared_cycles"],
        "products": held / TENSOR_FLOPS * (wide / c["wide_share"] + narrow / c["narrow_share"]),
    }
    return {name: value / CYCLES * 1e6 for name, value in cycles.items()}


def slots_of(ours: Tensor) -> Tensor:
    """Programs of each kernel that the GPU holds at a time."""
    return ours[2] * MULTIPROCESSORS


def kernel_parts(ours: Tensor, c: Constants) -> dict[str, Tensor]:
    """Microseconds of kernels of this package: of their rounds, and of their bytes."""
    programs, size, slots = ours[0], ours[3], slots_of(ours)
    whole, rest = torch.floor(programs / slots), programs % slots
    full = longest(round_parts(ours, slots, c), PROGRAM_ORDER)
    last = longest(round_parts(ours, rest, c), PROGRAM_ORDER)
    rounds = whole * (c["program"] + full) + (rest > 0) * (c["program"] + last)
    return {"rounds": rounds, "memory": size / (c["bandwidth"] * 1e6)}


def microseconds(table: Table, c: Constants) -> Tensor:
    """Device time of each pass."""
    total = c["first"] + c["aten_launch"] * table.unseen
    ours = c["launch"] + longest(kernel_parts(table.ours, c))
    aten = c["aten_launch"] + aten_time.microseconds(table.aten, c)
    total = total.index_add(0, table.ours_in, ours)
    return total.index_add(0, table.aten_in, aten)
