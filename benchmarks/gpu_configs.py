"""Which config of each kernel wins at the named shapes; writes the table that launches read."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.gpu_checks import step
from benchmarks.ops import with_upstream
from vlm_fast.kernels import _configs
from vlm_fast.kernels._launcher import Kernel
from vlm_fast.measure import timing
from vlm_fast.op import OPS

Row = dict[str, Any]
DTYPES = (torch.bfloat16, torch.float32)
WORTH = 0.98  # another config must take less than this share of the default's time


@dataclass(frozen=True)
class Call:
    """One launch as it was asked for, with its tensors."""

    kernel: Kernel
    size: int
    grid: Callable[[dict[str, int]], tuple[int, ...]]
    arguments: tuple[Any, ...]

    @property
    def dtype(self) -> torch.dtype:
        return next(a.dtype for a in self.arguments if isinstance(a, Tensor))

    def launch(self, index: int) -> None:
        config = self.kernel.configs[index]
        self.kernel.jit[self.grid(config.blocks)](*self.arguments, **config.options())


@contextlib.contextmanager
def calls() -> Iterator[list[Call]]:
    """Collect what is launched, and launch it."""
    found: list[Call] = []
    launch = Kernel.__call__

    def collect(kernel: Kernel, size: int, grid: Any, *arguments: Any) -> None:
        found.append(Call(kernel, size, grid, arguments))
        launch(kernel, size, grid, *arguments)

    with mock.patch.object(Kernel, "__call__", collect):
        yield found


def measure(device: str, deadline: float) -> list[Row]:
    """A row per kernel, dtype, size and config, in the order of the named shapes."""
    rows: list[Row] = []
    seen: set[tuple[str, torch.dtype, int]] = set()
    for dtype in DTYPES:
        for op in OPS.values():
            for shape in op.bench_shapes.values():
                if time.monotonic() > deadline:
                    return rows
                torch.manual_seed(0)
                args, options = op.sample(shape, dtype, device)
                with calls() as found:
                    step(op.fast, with_upstream(op, args, options), options)
                for call in found:
                    key = (call.kernel.name, call.dtype, call.size)
                    if key not in seen and len(call.kernel.configs) > 1:
                        seen.add(key)
                        rows += _time(call, device)
                del args, found
    return rows


def _time(call: Call, device: str) -> list[Row]:
    alternatives = {
        str(index): functools.partial(call.launch, index)
        for index in range(len(call.kernel.configs))
    }
    times = timing.interleaved(alternatives, [()], device=device, seconds=0.25, rounds=(9, 50))
    return [
        {
            "kernel": call.kernel.name,
            "dtype": str(call.dtype).removeprefix("torch."),
            "size": call.size,
            "config": index,
            "options": call.kernel.configs[index].options(),
            "median": times[str(index)].median,
            "lower": times[str(index)].lower,
            "upper": times[str(index)].upper,
        }
        for index in range(len(call.kernel.configs))
    ]


def table(rows: list[Row]) -> dict[str, Any]:
    """The winners: the default, unless another one is faster beyond doubt."""
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["dtype"], row["size"]), []).append(row)
    for (kernel, dtype, size), group in groups.items():
        default = next(row for row in group if row["config"] == 0)
        best = min(group, key=lambda row: row["median"])
        sure = best["upper"] < default["lower"] and best["median"] < WORTH * default["median"]
        winner = best["config"] if sure else 0
        kernels.setdefault(kernel, {}).setdefault(dtype, {})[str(size)] = winner
    return {"schema": _configs.SCHEMA, "kernels": kernels}


def write(rows: list[Row]) -> Path:
    """Write the table of this GPU, and let this process read it again."""
    path = _configs.DIRECTORY / _configs.table_name(
        torch.cuda.get_device_capability(), torch.cuda.get_device_properties(0).name
    )
    machine.write(path, table(rows))
    for cached in (_configs._table, _configs.winner):
        cached.cache_clear()
    return path
