"""The GPU that host time is measured on: a real one, or stub libraries that compute nothing."""

from __future__ import annotations

import ctypes
import functools
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlm_fast.devtools import launches as profiled

COUNTERS = {
    "libcuda.so.1": ("stub_launches",),
    "libcudart.so.13": ("stub_runtime_launches",),
    "libcublas.so.13": ("stub_products",),
    "libcublasLt.so.13": ("stub_products_lt",),
}


_cost = 0  # nanoseconds of a launch on the stub


@functools.cache
def counters() -> tuple[Callable[[], int], ...] | None:
    """Functions of the stub libraries that count launches; None on a real GPU."""
    found = []
    for library, names in COUNTERS.items():
        try:
            loaded = ctypes.CDLL(library)
        except OSError:
            return None
        for name in names:
            if not hasattr(loaded, name):
                return None
            getattr(loaded, name).restype = ctypes.c_ulonglong
            found.append(getattr(loaded, name))
    return tuple(found)


def is_stub() -> bool:
    return counters() is not None


def description() -> str:
    """The device in words, for the title of a table."""
    if is_stub():
        return f"a stub GPU, {_cost / 1000:g} us a launch, torch {torch.__version__}"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{name}, torch {torch.__version__}"


def set_cost(nanoseconds: int) -> None:
    """Let every launch on the stub take this long; ATen's, Triton's and our own."""
    global _cost
    _cost = nanoseconds
    for library in ("libcuda.so.1", "libcudart.so.13"):
        ctypes.CDLL(library).stub_set_cost(ctypes.c_long(nanoseconds))


def set_read(value: int) -> None:
    """Let the host read this count on the stub, and true conditions; -1 ends it."""
    ctypes.CDLL("libcudart.so.13").stub_set_read(value)


def launches(call: Callable[[], Any]) -> int:
    """How many kernels a call launches, matrix products among them."""
    counted = counters()
    if counted is None:
        return profiled.launches(call, "cuda" if torch.cuda.is_available() else "cpu") or 0
    before = sum(count() for count in counted)
    call()
    return sum(count() for count in counted) - before


def wait() -> None:
    """Wait until a GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def best_times(calls: Sequence[Callable[[], Any]], number: int, runs: int) -> list[float]:
    """Microseconds of each call, the best of some runs in turns.

    On the stub it is the CPU time of the process, so other work on the machine does not count. On
    a GPU it is the time until its work is done.
    """
    clock = time.process_time if is_stub() else time.perf_counter
    best = [float("inf")] * len(calls)
    gc.collect()
    gc.disable()
    try:
        for _ in range(runs):
            for i, call in enumerate(calls):
                wait()
                start = clock()
                for _ in range(number):
                    call()
                wait()
                best[i] = min(best[i], (clock() - start) / number * 1e6)
    finally:
        gc.enable()
    return best
