"""What the GPU run will launch, compiled beforehand into Triton's cache, on all cores.

One by one, as they are first launched, the kernels of all shapes would take longer than the whole
run has. The workers see no GPU: what is launched is recorded on tensors without data, as for
`vlm_fast.devtools.ahead_of_time`.
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
    """Each different piece of code that one op launches in one dtype."""
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
    """How many builds of an op in a dtype are in the cache now."""
    return sum(1 for build in builds(name, dtype, arch) if build.compile())


def compile_all(
    arch: str, deadline: float, names: list[str] | None = None, workers: int | None = None
) -> tuple[int, list[str]]:
    """How many builds are in the cache, and what went wrong; nothing begins after the deadline."""
    tasks = [(name, dtype, arch) for name in names or OPS for dtype in FLOATS]
    # What takes longest first, so that no core waits for one at the end.
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
