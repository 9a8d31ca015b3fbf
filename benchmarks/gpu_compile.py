"""Compile the kernels of the GPU run into Triton's cache beforehand, on all cores.

Compiled one by one at their first launch, they would take longer than the whole run. The workers
use no GPU: launches are recorded on tensors without data, as in `vlm_fast.devtools.ahead_of_time`.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from typing import Any
from unittest import mock

import torch

from vlm_fast.devtools import ahead_of_time
from vlm_fast.ops.declaration import FLOATS, OPS, Op
from vlm_fast.verification import self_test

Wanted = tuple[Mapping[str, Any], torch.dtype]
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def wanted(op: Op[..., Any]) -> Iterator[Wanted]:
    """Shapes and dtypes that the stages launch."""
    for _, shape in self_test.shapes(op, full=True):
        yield from ((shape, dtype) for dtype in FLOATS)
    for shape in op.bench_shapes.values():
        yield from ((shape, dtype) for dtype in (torch.bfloat16, torch.float32))


def builds(name: str, dtype: torch.dtype, arch: str) -> Iterator[ahead_of_time.Build]:
    """The distinct builds that one op launches in one dtype."""
    seen: set[Any] = set()
    for shape, of in wanted(OPS[name]):
        if of is dtype:
            for launch in ahead_of_time.launches_at(OPS[name], shape, dtype):
                for index in range(len(launch.kernel.configs)):
                    build = ahead_of_time.build_of(launch, arch, index)
                    if (key := (index, build.source.hash())) not in seen:
                        seen.add(key)
                        yield build


def compile_one(name: str, dtype: torch.dtype, arch: str) -> int:
    """Compile the builds of an op in a dtype, and return how many are in the cache."""
    return sum(1 for build in builds(name, dtype, arch) if build.compile())


def compile_all(
    arch: str, deadline: float, names: list[str] | None = None, workers: int | None = None
) -> tuple[int, list[str]]:
    """Return how many builds are in the cache, and the failures; none begins after the deadline."""
    tasks = [(name, dtype, arch) for name in names or OPS for dtype in FLOATS]
    # The slowest first, so that no core is idle at the end.
    tasks.sort(key=lambda task: -len(list(wanted(OPS[task[0]]))))
    count, failures = 0, []
    with mock.patch.dict(os.environ, HIDDEN):  # the workers inherit it
        pool = ProcessPoolExecutor(
            workers or os.cpu_count(), mp_context=multiprocessing.get_context("spawn")
        )
        futures = {pool.submit(compile_one, *task): task for task in tasks}
        left = max(deadline - time.monotonic(), 0.0)
        done, late = wait(futures, None if math.isinf(left) else left, FIRST_EXCEPTION)
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list((pool._processes or {}).values()):
            process.terminate()
    for future in done:
        name, dtype, _ = futures[future]
        if error := future.exception():
            failures.append(f"{name} {dtype}: {type(error).__name__}: {error}")
        else:
            count += future.result()
    if late:
        failures.append(f"out of time: {len(late)} of {len(tasks)} not compiled")
    return count, failures
