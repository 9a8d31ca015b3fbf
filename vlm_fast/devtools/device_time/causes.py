"""What limits a pass: its predicted time, divided among causes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from vlm_fast.devtools.device_time.aten_time import CLASSES, product_parts
from vlm_fast.devtools.device_time.counts import Counts
from vlm_fast.devtools.device_time.model import (
    Constants,
    Table,
    kernel_parts,
    microseconds,
    round_parts,
    slots_of,
)
from vlm_fast.devtools.device_time.pass_kernels import AtenKernel

WAVES = 0.25  # the share of its time from which a kernel's last, incomplete round is a cause


def time_by_cause(counted: Sequence[Counts], c: Constants) -> Iterator[tuple[str, str, float]]:
    """Cause, kernel and microseconds of the parts of a pass.

    The causes are "launch", "memory", "products", "instruction issue", "shared memory", "waves"
    (the last, incomplete round of programs) and "occupancy" (a program waits for its own
    instructions and loads, and too few others run beside it).
    """
    yield "launch", counted[0].name, c["first"]
    for kernel in counted:
        table = Table.of([[kernel]])
        total = microseconds(table, c).item() - c["first"]
        if isinstance(kernel, AtenKernel):
            gap = c["aten_launch"]
            work = _largest(product_parts(table.aten, c))
            cause = work if table.aten[5].item() == CLASSES.index("product") else "memory"
        else:
            gap = c["launch"]
            cause, lost = _cause(table, c)
            if lost:
                yield "waves", kernel.name, lost
            total -= lost
        yield "launch", kernel.name, gap
        yield cause, kernel.name, total - gap


def _cause(table: Table, c: Constants) -> tuple[str, float]:
    """What a kernel of this package waits for, and microseconds that waves lose."""
    ours = table.ours
    parts = kernel_parts(ours, c)
    if _largest(parts) == "memory":
        return "memory", 0.0
    programs, slots = ours[0], slots_of(ours)
    full = kernel_parts(torch.cat([slots[None], ours[1:]]), c)["rounds"]  # of one whole round
    lost = (parts["rounds"] - programs / slots * full).item() if programs > slots else 0.0
    lost = lost if lost > WAVES * parts["rounds"].item() else 0.0
    cause = _largest(round_parts(ours, torch.minimum(programs, slots), c))
    return {"latency": "occupancy", "issue": "instruction issue"}.get(cause, cause), lost


def _largest(parts: Mapping[str, torch.Tensor]) -> str:
    return max(parts, key=lambda name: parts[name].item())
