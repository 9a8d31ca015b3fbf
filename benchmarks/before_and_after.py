"""Pieces of a model before and after, timed in turns: what the benchmarks of the families share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import machine
from vlm_fast import tables
from vlm_fast.measure import timing

Calls = dict[str, Callable[[], Any]]  # "before", "after" and others
Part = tuple[str, Calls]
Parts = Callable[[str, torch.dtype, bool], Iterator[Part]]  # of device, dtype, whether quick
Row = dict[str, Any]
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}


def without_gradients(calls: Calls) -> Calls:
    return {state: torch.no_grad()(f) for state, f in calls.items()}


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
    """Measure, about ``seconds`` a part, print a table, and return what was found.

    No part is begun after ``deadline`` (of ``time.monotonic``); "finished" says whether all were.
    """
    seconds = 0.2 if quick else seconds
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPE[device] if dtype is None else dtype
    rows: list[Row] = []
    finished = True
    with timing.one_thread():
        for some in parts:
            torch.manual_seed(0)
            for name, calls in some(device, dtype, quick):
                if time.monotonic() > deadline:
                    finished = False
                    break
                rows += compare(name, calls, device, seconds)
    found = {"rows": rows, "dtype": str(dtype).removeprefix("torch."), "finished": finished}
    show(family, found, device)
    return found


def compare(name: str, calls: Calls, device: str, seconds: float) -> list[Row]:
    """All in turns."""
    times = timing.interleaved(
        calls, [()], device=device, seconds=seconds, rounds=(3, 200), wall=True
    )
    return [
        {
            "part": name,
            "state": state,
            **asdict(times[state]),
            "ratio": times["before"].median / times[state].median,
            "ours_is": timing.verdict(times[state], times["before"]),
        }
        for state in calls
    ]


def show(family: str, found: dict[str, Any], device: str) -> None:
    threads = ", one thread" if device == "cpu" else ""
    columns = ("part", "", "median", "quartiles", "times faster", "is")
    cells = [
        (
            row["part"],
            row["state"],
            f"{row['median'] * 1e3:.2f} ms",
            f"{row['lower'] * 1e3:.2f}-{row['upper'] * 1e3:.2f}",
            f"{row['ratio']:.2f}",
            row["ours_is"],
        )
        for row in found["rows"]
    ]
    tables.show(f"{family}, {found['dtype']}, on {machine.name(device)}{threads}", columns, cells)
