"""Which config of each kernel wins on this GPU: proven right, measured in turns, written.

`measure` times what the ops launch at their bench shapes; `selection` keeps what is faster beyond
doubt; `write` puts it where launches look: see `vlm_fast.kernels._user_table`. Nothing of this runs
unless it is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import filelock
import torch
from torch import Tensor

from vlm_fast.devtools import ahead_of_time, timing
from vlm_fast.devtools.passes import step, with_upstream
from vlm_fast.kernels import _configs, _hopper, _user_table
from vlm_fast.kernels._launcher import KERNELS, Config, Kernel, Launch, recording
from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import self_test

Row = dict[str, Any]
Progress = Callable[[int, int], None]
DTYPES = (torch.bfloat16, torch.float32)
WORTH = 0.98  # another config must take less than this share of the default's time


# ---- which configs are right ----


@dataclass(frozen=True)
class Candidate:
    """One config of one kernel: the checks that it failed, a line each; none if it is right."""

    kernel: str
    config: int
    failures: tuple[str, ...]


def launched_by(names: Iterable[str] | None = None) -> dict[str, list[str]]:
    """The ops that launch each kernel, of those kernels that ``names`` launch: on stand-ins."""
    found, wanted = _ops_of_kernels(), set(OPS if names is None else names)
    return {kernel: found[kernel] for kernel in found if wanted & set(found[kernel])}


@functools.cache
def _ops_of_kernels() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for op in OPS.values():
        launches = ahead_of_time.launches(op, DTYPES[:1])
        for kernel in dict.fromkeys(launch.kernel.name for launch in launches):
            found.setdefault(kernel, []).append(op.name)
    return found


def prove(
    names: Iterable[str] | None = None,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES[:1],
    device: str = "cuda",
    deadline: float = float("inf"),
    progress: Progress | None = None,
) -> Iterator[Candidate]:
    """Every config of every kernel that these ops launch, judged by parity of all its ops.

    The other kernels keep their first config. Of an op these are two test shapes and the last named
    one, made small. A config that nothing launches, or that time did not reach, is not right.

    Raises:
        RuntimeError: the device gives nothing but errors after a config that broke it.
    """
    ops_of = launched_by(names)
    todo = [(KERNELS[k], index) for k in ops_of for index in range(len(KERNELS[k].configs))]
    for done, (kernel, index) in enumerate(todo):
        if progress is not None:
            progress(done, len(todo))
        failures: list[str] = []
        with fixed(kernel, index) as launched:
            for name in ops_of[kernel.name]:
                shapes = list(self_test.shapes(OPS[name], full=False))
                for label, shape in (shapes[1], shapes[2], shapes[-1]):
                    for dtype in dtypes:
                        if time.monotonic() > deadline:
                            yield Candidate(kernel.name, index, (*failures, "out of time"))
                            return
                        case = self_test.check(OPS[name], label, shape, dtype, device)
                        failures += case.failures()
                        if case.raised is not None:
                            _refuse_a_broken_device(kernel, index, device)
        if not launched:
            failures.append(f"{kernel.name}: no check launches it")
        yield Candidate(kernel.name, index, tuple(failures))


@contextlib.contextmanager
def fixed(kernel: Kernel, index: int) -> Iterator[list[int]]:
    """One kernel with this config, the others with their first; collects a size a launch of it."""
    sizes: list[int] = []

    def choose(self: Kernel, tensor: Tensor, size: int) -> Config:
        if self is not kernel:
            return self.configs[0]
        sizes.append(size)
        return self.configs[index]

    with mock.patch.object(Kernel, "choose", choose), _triton_alone():
        yield sizes


def _triton_alone() -> contextlib.AbstractContextManager[object]:
    """Without the optional GEMMs, in whose place a kernel of Triton would not be launched."""
    return mock.patch.object(_hopper, "runs_here", lambda like: False)


def _refuse_a_broken_device(kernel: Kernel, index: int, device: str) -> None:
    try:
        timing.wait(device)
    except RuntimeError as error:
        raise RuntimeError(f"{kernel.name} with config {index} broke the GPU: {error}") from error


# ---- which of them wins ----


def measure(
    right: Mapping[str, Sequence[int]],
    names: Iterable[str] | None = None,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    device: str = "cuda",
    deadline: float = float("inf"),
    progress: Progress | None = None,
) -> tuple[list[Row], bool]:
    """A row per kernel, dtype, size and right config at the bench shapes, and whether all is done.

    Args:
        right: kernel -> indices of configs to compare; without 0, or with 0 alone, it is left out.
        deadline: of `time.monotonic`; looked at between shapes.
    """
    rows: list[Row] = []
    seen: set[tuple[str, torch.dtype, int]] = set()
    todo = [
        (dtype, OPS[name], shape)
        for dtype in dtypes
        for name in (OPS if names is None else names)
        for shape in OPS[name].bench_shapes.values()
    ]
    for done, (dtype, op, shape) in enumerate(todo):
        if time.monotonic() > deadline:
            return rows, False
        if progress is not None:
            progress(done, len(todo))
        torch.manual_seed(0)
        args, options = op.sample(shape, dtype, device)
        with recording() as found, _triton_alone():
            step(op.fast, with_upstream(op, args, options), options)
        for launch in found:
            key = (launch.kernel.name, launch.dtype, launch.size)
            indices = right.get(launch.kernel.name, ())
            if key not in seen and 0 in indices and len(indices) > 1:
                seen.add(key)
                rows += _time(launch, indices, device)
        del args, found
    return rows, True


def _time(launch: Launch, indices: Sequence[int], device: str) -> list[Row]:
    alternatives = {index: functools.partial(launch.again, index) for index in indices}
    options = {index: launch.kernel.configs[index].options() for index in indices}
    return rows_of(launch.kernel.name, launch.dtype, launch.size, alternatives, options, device)


def rows_of(
    kernel: str,
    dtype: torch.dtype,
    size: int,
    alternatives: Mapping[int, Callable[[], object]],
    options: Mapping[int, Mapping[str, Any]],
    device: str,
) -> list[Row]:
    """The times of alternatives that a table chooses among, in turns."""
    calls = {str(index): call for index, call in alternatives.items()}
    times = timing.interleaved(calls, [()], device=device, seconds=0.25, rounds=(9, 50))
    return [
        {
            "kernel": kernel,
            "dtype": str(dtype).removeprefix("torch."),
            "size": size,
            "config": index,
            "options": options[index],
            "median": times[str(index)].median,
            "lower": times[str(index)].lower,
            "upper": times[str(index)].upper,
        }
        for index in alternatives
    ]


def selection(rows: Iterable[Row]) -> _user_table.Entries:
    """The winners: the default, unless another one is faster beyond doubt."""
    kernels: _user_table.Entries = {}
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["dtype"], row["size"]), []).append(row)
    for (kernel, dtype, size), group in groups.items():
        default = next(row for row in group if row["config"] == 0)
        best = min(group, key=lambda row: row["median"])
        sure = best["upper"] < default["lower"] and best["median"] < WORTH * default["median"]
        winner = best["config"] if sure else 0
        kernels.setdefault(kernel, {}).setdefault(dtype, {})[str(size)] = winner
    return kernels


# ---- where launches look ----


def private_directory() -> Path:
    """The directory of user tables, made if need be, for its owner alone.

    Raises:
        ValueError: a variable does not name a usable path.
        PermissionError: the directory is not to be trusted, or cannot be made; says the remedy.
    """
    path = _user_table.directory()
    try:
        # Not by one call: mkdir's mode holds for the last directory only.
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        for place in (path.parent, path):
            with contextlib.suppress(FileExistsError):
                place.mkdir(mode=0o700)
        reason = _user_table.distrust(path)
    except OSError as error:
        raise PermissionError(f"{path} cannot be made: {error.strerror or error}") from error
    if not reason and not os.access(path, os.W_OK | os.X_OK):
        reason = f"{path} cannot be written; chmod 700 {path}"
    if reason:
        raise PermissionError(reason)
    return path


def write(name: str, gpu: str, kernels: _user_table.Entries) -> Path:
    """Put entries over those of the user's table, for later processes and for this one.

    A reader sees the old table or the new one, whatever happens meanwhile; of two writers none
    loses its entries.

    Raises:
        ValueError, PermissionError: as `private_directory`; OSError: nothing could be written.
    """
    path = private_directory() / name
    with filelock.FileLock(path.with_name(f"{name}.lock"), timeout=30, mode=0o600):
        merged = _user_table.load(path, _configs.SOURCES).kernels
        for kernel, by_dtype in kernels.items():
            for dtype, by_size in by_dtype.items():
                merged.setdefault(kernel, {}).setdefault(dtype, {}).update(by_size)
        content = {
            "schema": _user_table.SCHEMA,
            "gpu": gpu,
            "versions": {"torch": torch.__version__, "triton": _user_table.triton_version()},
            "sources": {kernel: _configs.SOURCES[kernel]() for kernel in merged},
            "kernels": merged,
        }
        replace(path, json.dumps(content, indent=1) + "\n")
    _configs.forget()
    return path


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all; on disk before it takes the other's place."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
