"""Time alternatives in turns, so that heat, clock changes and other load affect all of them."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20  # larger than the L2 cache of any GPU
HEAD_START_CYCLES = 2_000_000  # about a millisecond, during which launches queue up
COPY_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}


@dataclass(frozen=True)
class Times:
    """Seconds of one call.

    Attributes:
        median: of all rounds.
        lower, upper: quartiles.
        rounds: number of measurements.
    """

    median: float
    lower: float
    upper: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """Median and quartiles of measured seconds."""
        values = torch.tensor(seconds, dtype=torch.float64)
        lower, median, upper = values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype))
        return cls(median.item(), lower.item(), upper.item(), len(seconds))


def verdict(ours: Times, theirs: Times) -> str:
    """ "faster", "slower", or "same" if the quartiles overlap."""
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
    """Median and quartiles of every call, measured in turns.

    On CUDA each call is preceded by a write over the L2 cache and a short wait, so that the events
    around it time the GPU and not the launches.

    Args:
        calls: by name.
        inputs: sets of arguments, used in rotation.
        device: "cuda" or "cpu".
        seconds: for all calls together.
        rounds: fewest and most rounds.
        wall: use the host's clock, from an idle device until the work is done, which includes
            launches and synchronisations. Always so on a CPU.
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
    """Seconds of every call in the order of measurement; arguments as in `interleaved`."""
    clock = _wall(device) if wall or device == "cpu" else _Events()
    for call in calls.values():  # compile, allocate and warm up
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
            # Rotate the order, so that no call always runs first or after the same other call.
            for name in names[i % len(names) :] + names[: i % len(names)]:
                found[name].append(clock(calls[name], inputs[i % len(inputs)]))
    finally:
        if collecting:
            gc.enable()
    return found


def wait(device: str) -> None:
    """Wait until the device has finished its work."""
    if device != "cpu":
        torch.cuda.synchronize()


def once(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call on the host's clock, from an idle device until its work is done."""
    return _wall(device)(call, ())


def _wall(device: str) -> Callable[..., float]:
    def measure(call: Callable[..., Any], args: tuple[Any, ...]) -> float:
        wait(device)
        start = time.perf_counter()
        result = call(*args)
        wait(device)
        seconds = time.perf_counter() - start
        del result  # freeing the result is not part of the call
        return seconds

    return measure


class _Events:
    """Seconds on the GPU between two CUDA events."""

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
    """Use one CPU thread: several wait for each other and for other load."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of this machine: of a large copy and of a large square matrix product.

    Attributes:
        copy_bytes_per_second: bytes read plus bytes written.
        matmul_flops_per_second: FLOPs.
    """

    copy_bytes_per_second: float
    matmul_flops_per_second: float


def ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Measure the rates of a device in a dtype."""
    size, side = COPY_BYTES[device] // dtype.itemsize, MATMUL_SIZE[device]
    source, target = (torch.randn(size, device=device).to(dtype) for _ in range(2))
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = interleaved(
        {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, [()], device=device
    )
    return Ceilings(
        2 * size * dtype.itemsize / times["copy"].median, 2 * side**3 / times["matmul"].median
    )
