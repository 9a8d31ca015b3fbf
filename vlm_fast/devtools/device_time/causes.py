"""What limits a pass: its predicted time, divided among causes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from vlm_fast.devtools.device_time.aten_time import CLASSES, PROGRAM_ORDER, product_parts
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
NAMES = {"latency": "occupancy", "issue": "instruction issue"}


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
            product = table.aten[5].item() == CLASSES.index("product")
            shares = {work if product else "memory": total - gap}
        else:
            gap = c["launch"]
            shares = _shares(table.ours, total - gap, c)
        yield "launch", kernel.name, gap
        for cause, time in shares.items():
            yield cause, kernel.name, time


def _shares(ours: torch.Tensor, total: float, c: Constants) -> dict[str, float]:
    """What the time of a kernel of this package, without its launch, goes to."""
    parts = kernel_parts(ours, c)
    if _largest(parts) == "memory":
        return {"memory": total}
    programs, slots = ours[0], slots_of(ours)
    full = kernel_parts(torch.cat([slots[None], ours[1:]]), c)["rounds"]  # of one whole round
    lost = (parts["rounds"] - programs / slots * full).item() if programs > slots else 0.0
    found = {"waves": lost} if lost > WAVES * total else {}
    waits = round_parts(ours, torch.minimum(programs, slots), c)
    weights = {name: wait.pow(PROGRAM_ORDER).item() for name, wait in waits.items()}
    left, whole = total - sum(found.values()), sum(weights.values()) or 1.0
    for name, weight in weights.items():
        found[NAMES.get(name, name)] = left * weight / whole
    if not any(weights.values()):
        found["occupancy"] = left
    return found


def _largest(parts: Mapping[str, torch.Tensor]) -> str:
    return max(parts, key=lambda name: parts[name].item())
