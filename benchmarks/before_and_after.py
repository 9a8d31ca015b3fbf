"""Time pieces of a model in several states, such as before and after a patch, in turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm_fast import terminal
from vlm_fast.benchmarks import machine
from vlm_fast.devtools import memory, timing
from vlm_fast.devtools.launches import launches
from vlm_fast.devtools.operations import count_operations

Calls = dict[str, Callable[[], Any]]  # "before", "after" and others
Row = dict[str, Any]
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
COMPILED = ("compiled", "graphed")  # states whose operations and saved bytes are not counted


class Part(NamedTuple):
    """One piece of work in several states: "before" and "after" a patch, and others.

    Attributes:
        name: of the piece.
        calls: a function for each state.
        known: inputs of the calls, which do not count as saved for backward.
    """

    name: str
    calls: Calls
    known: Sequence[Tensor] = ()


Parts = Callable[[str, torch.dtype, bool], Iterator[Part]]  # of device, dtype, quick


def without_gradients(calls: Calls) -> Calls:
    return {state: torch.no_grad()(f) for state, f in calls.items()}


def with_gradients(calls: Calls, wanted: Sequence[Tensor], upstream: Tensor) -> Calls:
    """Forward and backward: the gradients of ``wanted``."""

    def step(call: Callable[[], Any]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(), wanted, upstream)

    return {state: partial(step, call) for state, call in calls.items()}


def measure(
    family: str,
    parts: Sequence[Parts],
    *,
    quick: bool = False,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    seconds: float = 20.0,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """Measure each part for about ``seconds``, print a table, and return rows and dtype.

    No part is begun after ``deadline`` (of ``time.monotonic``). "finished" in the result says
    whether all parts were measured.
    """
    seconds = 0.2 if quick else seconds
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPE[device] if dtype is None else dtype
    rows: list[Row] = []
    finished = True
    with timing.one_thread():
        for some in parts:
            torch.manual_seed(0)
            more, finished = compare_all(some(device, dtype, quick), device, seconds, deadline)
            rows += more
            if not finished:
                break
    found = {"rows": rows, "dtype": str(dtype).removeprefix("torch."), "finished": finished}
    show(f"{family}, {found['dtype']}", rows, device)
    return found


def compare_all(
    parts: Iterable[Part], device: str, seconds: float, deadline: float = math.inf
) -> tuple[list[Row], bool]:
    """Return the rows of all parts, and whether all were begun before the deadline."""
    rows: list[Row] = []
    for part in parts:
        if time.monotonic() > deadline:
            return rows, False
        rows += compare(part, device, seconds)
    return rows, True


def compare(part: Part, device: str, seconds: float) -> list[Row]:
    """Return a row for each state of the part.

    The states are timed in turns, by the host's clock, from an idle device until its work is done.
    ``first_seconds`` is the first call in this process, which compiles, loads and allocates.
    Launches on a CPU, and the saved bytes of a compiled program, are None.
    """
    first = {state: timing.once(call, device) for state, call in part.calls.items()}
    times = timing.interleaved(
        part.calls, [()], device=device, seconds=seconds, rounds=(3, 200), wall=True
    )
    rows = []
    for state, call in part.calls.items():
        seen = state not in COMPILED
        peak, results = memory.peak_bytes(call, device), memory.result_bytes(call())
        rows.append(
            {
                "part": part.name,
                "state": state,
                **asdict(times[state]),
                "ratio": times["before"].median / times[state].median,
                "ours_is": ""
                if state == "before"
                else timing.verdict(times[state], times["before"]),
                "first_seconds": first[state],
                "saved_bytes": memory.saved_bytes(call, part.known) if seen else None,
                "peak_bytes": peak,
                "transient_bytes": peak - results,
                "synchronisations": memory.host_syncs(call, device),
                "operations": count_operations(call) if seen and device == "cpu" else None,
                "launches": launches(call, device),
            }
        )
    return rows


def show(title: str, rows: Sequence[Row], device: str) -> None:
    columns = (
        "part", "", "median", "quartiles", "times faster", "is", "first", "saved MB", "peak MB",
        "transient MB", "waits", "operations" if device == "cpu" else "launches",
    )  # fmt: skip
    threads = ", one thread" if device == "cpu" else ""
    terminal.show(
        f"{title}, on {machine.name(device)}{threads}", columns, [_cells(r) for r in rows]
    )


def _cells(row: Row) -> tuple[object, ...]:
    done = row["operations"] if row["launches"] is None else row["launches"]
    return (
        row["part"],
        row["state"],
        f"{row['median'] * 1e3:.2f} ms",
        f"{row['lower'] * 1e3:.2f}-{row['upper'] * 1e3:.2f}",
        f"{row['ratio']:.2f}",
        row["ours_is"],
        f"{row['first_seconds'] * 1e3:.1f} ms",
        *("" if row[key] is None else f"{row[key] / 1e6:.2f}" for key in BYTES),
        row["synchronisations"],
        "" if done is None else done,
    )


BYTES = ("saved_bytes", "peak_bytes", "transient_bytes")
