"""The ops in pytest-benchmark's store, for histories and for failing on a regression::

    pytest benchmarks --benchmark-autosave
    pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:10%

Alternatives are timed in turns, as everywhere here, and their times then handed to the store.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vlm_fast.benchmarks import ops, providers
from vlm_fast.devtools import timing
from vlm_fast.devtools.passes import MODES
from vlm_fast.ops.declaration import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = DEVICE == "cpu"


class Replay:
    """A clock that tells durations taken before: two readings for each."""

    def __init__(self) -> None:
        self.readings: Iterator[float] = iter(())

    def of(self, seconds: list[float]) -> None:
        starts = itertools.accumulate(seconds, initial=0.0)
        self.readings = itertools.chain.from_iterable(
            (start, start + taken) for start, taken in zip(starts, seconds, strict=False)
        )

    def __call__(self) -> float:
        return next(self.readings)


replay = Replay()


@functools.lru_cache(maxsize=1)
def measured(op: str, shape: str, mode: str) -> dict[str, tuple[dict[str, Any], list[float]]]:
    selection = ops.Selection([op], [shape], [mode])
    with timing.one_thread():
        found = ops.measure(selection, device=DEVICE, quick=QUICK)
        return {row["provider"]: (row, seconds) for row, seconds in found}


def cases() -> Iterator[tuple[str, str, str, str]]:
    for op in OPS.values():
        peers = [peer.name for peer in providers.PEERS if peer.op == op.name]
        for shape, _ in ops.shapes_of(op, DEVICE, quick=QUICK):
            for mode in MODES[:1] if op.returns_indices else MODES:
                for provider in (providers.OURS, providers.EAGER, *providers.COMPILED, *peers):
                    yield op.name, shape, mode, provider


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize(("op", "shape", "mode", "provider"), cases())
def test_speed(benchmark: Any, op: str, shape: str, mode: str, provider: str) -> None:
    row, seconds = measured(op, shape, mode)[provider]
    if row["status"] != "measured":
        pytest.skip(row["reason"])
    benchmark.group = f"{op}, {shape}, {mode}"
    benchmark.extra_info.update(row)
    replay.of(seconds)
    benchmark.pedantic(lambda: None, rounds=len(seconds))
