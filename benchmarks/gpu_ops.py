"""Time every op on a GPU in the time of a stage, so that a run that ends early has timed each op.

First the first shape of each op, forward and backward, then the other shapes, then both passes
together, and last, at the first shape of each op, what compiles for seconds at its first call.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm_fast.benchmarks import ops, providers
from vlm_fast.benchmarks.ops import Case, Pace, Row, Selection
from vlm_fast.devtools import timing
from vlm_fast.ops.declaration import OPS, Op

Shape = tuple[Op[..., Any], str, dict[str, Any]]
SECONDS = 0.08  # for which the providers of one pass take turns
PASSES = ("forward", "backward")
SLOW = {*providers.COMPILED, *(peer.name for peer in providers.PEERS if peer.compiles)}
OTHERS = tuple(name for name in providers.NAMES if name not in SLOW)


@dataclass(frozen=True)
class Sweep:
    """One round over shapes.

    Attributes:
        shapes: op, name and sizes of each.
        modes: passes to time.
        providers: names of those that take turns.
        kept: names of those whose rows are kept; the others were timed in an earlier sweep.
        required: whether the stage has failed if it ends before the sweep does.
    """

    shapes: Sequence[Shape]
    modes: Sequence[str]
    providers: Sequence[str]
    kept: Sequence[str]
    required: bool = False


def sweeps(device: str, *, quick: bool) -> list[Sweep]:
    """The rounds in their order; with ``quick`` there is one small shape of each op."""
    shapes = {op: list(ops.shapes_of(op, device, quick=quick)) for op in OPS.values()}
    first = [(op, *found[0]) for op, found in shapes.items()]
    rest = [(op, *shape) for op, found in shapes.items() for shape in found[1:]]
    slow = (providers.OURS, *(name for name in providers.NAMES if name in SLOW))
    return [
        Sweep(first, PASSES, OTHERS, OTHERS, required=True),
        Sweep(rest, PASSES, OTHERS, OTHERS, required=True),
        Sweep([*first, *rest], ("forward+backward",), OTHERS, OTHERS),
        Sweep(first, ops.MODES, slow, slow[1:]),
    ]


def measure(
    device: str, deadline: float, rows: list[Row], *, quick: bool = False, seconds: float = SECONDS
) -> list[str]:
    """Append a row to ``rows`` for each op, shape, pass and provider; return what is missing."""
    best = timing.ceilings(device, ops.DTYPE[device])
    for number, sweep in enumerate(sweeps(device, quick=quick)):
        pace = Pace.until(deadline, len(sweep.shapes))
        selection = Selection(modes=sweep.modes, providers=sweep.providers)
        compiles = sweep.kept != sweep.providers
        for step, (op, label, shape) in enumerate(sweep.shapes):
            if time.monotonic() > deadline:
                left = len(sweep.shapes) - step
                return [f"out of time: {left} shapes not timed"] if sweep.required else []
            case = Case(op, label, shape, selection, device, quick, seconds, best)
            # Launches are counted once an op: a profiler takes longer to start than an op.
            thorough = number == 0 or compiles
            for row, _ in case.rows(pace, step, thorough=thorough):
                if row["provider"] in sweep.kept:
                    rows.append(row)
    return []
