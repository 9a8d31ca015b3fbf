"""Times of alternatives, measured in turns, so that heat, clocks and other work hit all alike."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any GPU
HEAD_START_CYCLES = 2_000_000  # about a millisecond: launches queue up behind it
COPY_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}


@dataclass(frozen=True)
class Times:
    """Seconds of one call: median and quartiles over ``rounds`` calls."""

    median: float
    lower: float
    upper: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        values = torch.tensor(seconds, dtype=torch.float64)
        lower, median, upper = values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype))
        return cls(median.item(), lower.item(), upper.item(), len(seconds))


def verdict(ours: Times, theirs: Times) -> str:
    """Nothing is claimed where the quartiles overlap."""
    if ours.upper < theirs.lower:
        return "faster"
    return "slower" if ours.lower > theirs.upper else "same"


def interleaved(
    calls: Mapping[str, Callable[..., Any]],
    inputs: Sequence[tuple[Any, ...]],
    *,
    device: str,
    seconds: float = 2.0,
    rounds: tuple[int, int] = (5, 200),
    wall: bool = False,
) -> dict[str, Times]:
    """Time every call in turns, on ``inputs`` in rotation, for about ``seconds`` in all.

    On CUDA each call is preceded by a write over the L2 cache and a short wait, so that the events
    around it time the GPU and not the launches. With ``wall`` the clock is the host's, from an idle
    GPU until its work is done, as on a CPU: this includes launches and synchronisations.
    """
    found = in_turns(calls, inputs, device=device, seconds=seconds, rounds=rounds, wall=wall)
    return {name: Times.of(values) for name, values in found.items()}


def in_turns(
    calls: Mapping[str, Callable[..., Any]],
    inputs: Sequence[tuple[Any, ...]],
    *,
    device: str,
    seconds: float = 2.0,
    rounds: tuple[int, int] = (5, 200),
    wall: bool = False,
) -> dict[str, list[float]]:
    """As `interleaved`: the seconds of every call in the order in which they were taken."""
    clock = _wall(device) if wall or device == "cpu" else _Events()
    for call in calls.values():  # compiles, allocates, and warms up
        for args in inputs:
            call(*args)
    found: dict[str, list[float]] = {name: [] for name in calls}
    if not calls:
        return found
    names, (least, most) = list(calls), rounds
    collecting = gc.isenabled()
    gc.disable()
    start = time.perf_counter()
    try:
        for i in range(most):
            if i >= least and time.perf_counter() - start > seconds:
                break
            # Nobody always runs first, or always after the same other.
            for name in names[i % len(names) :] + names[: i % len(names)]:
                found[name].append(clock(calls[name], inputs[i % len(inputs)]))
    finally:
        if collecting:
            gc.enable()
    return found


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def once(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call, from an idle device until its work is done."""
    return _wall(device)(call, ())


def _wall(device: str) -> Callable[..., float]:
    def measure(call: Callable[..., Any], args: tuple[Any, ...]) -> float:
        wait(device)
        start = time.perf_counter()
        result = call(*args)
        wait(device)
        seconds = time.perf_counter() - start
        del result  # freeing it is the caller's time
        return seconds

    return measure


class _Events:
    """Time on the GPU between two events."""

    def __init__(self) -> None:
        self.scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.scratch.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        call(*args)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread on the CPU: several wait for each other, and for whatever else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Ceilings:
    """What this machine does at best, measured in the same run: a copy and a square matmul."""

    copy_bytes_per_second: float
    matmul_flops_per_second: float


def ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    size, side = COPY_BYTES[device] // dtype.itemsize, MATMUL_SIZE[device]
    source, target = (torch.randn(size, device=device).to(dtype) for _ in range(2))
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = interleaved(
        {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, [()], device=device
    )
    return Ceilings(
        2 * size * dtype.itemsize / times["copy"].median, 2 * side**3 / times["matmul"].median
    )
