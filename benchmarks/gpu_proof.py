"""Checks of the ops on a GPU, with a process for each op and several at a time.

One process would take longer than the whole run, mostly in Python. An op that breaks the CUDA
context of its process does not affect the others.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest import mock

import torch

from vlm_fast.benchmarks import gpu_checks
from vlm_fast.kernels._launcher import KERNELS, recording
from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import results_files, self_test

T = TypeVar("T")
CHECKS = {
    "repeats": gpu_checks.repeats,
    "launchers": gpu_checks.launchers,
    "no synchronisation": gpu_checks.no_synchronisation,
    "CUDA graphs": gpu_checks.cuda_graphs,
    "side stream": gpu_checks.side_stream,
}
NEEDS_CUDA = {"no synchronisation", "CUDA graphs", "side stream"}
WORKERS = 12
SANITIZER = "compute-sanitizer"
MEMCHECK = (
    "import sys; from vlm_fast.benchmarks import gpu_proof; gpu_proof.memcheck_cases(sys.argv[1])"
)


@dataclass
class Proof:
    """Of one op: its parity, what else failed, and the kernels that were launched."""

    parity: dict[str, Any]
    failures: dict[str, list[str]] = field(default_factory=dict)
    launched: set[str] = field(default_factory=set)


def prove(name: str, device: str, deadline: float) -> Proof:
    """Parity in three dtypes at all shapes, and the checks."""
    torch.set_num_threads(1)  # there are as many processes as cores
    cases, late = [], False
    launched: set[str] = set()
    with recording() as launches:
        for case in self_test.run([name], device=device):
            cases.append(case)
            launched |= {launch.kernel.name for launch in launches}
            launches.clear()  # they hold their tensors
            if late := time.monotonic() > deadline:
                break
    parity = self_test.summarise(cases)[name]
    parity["failures"] += [f"{name}: out of time"] if late else []
    found = Proof(parity, launched=launched)
    for check, function in CHECKS.items():
        if device != "cpu" or check not in NEEDS_CUDA:
            found.failures[check] = function(device, [name])
    return found


def prove_all(
    device: str, deadline: float, names: Iterable[str] | None = None, workers: int = WORKERS
) -> tuple[dict[str, Proof], list[str]]:
    """The results of the checks by op, and a line for each op without results."""
    calls = {name: (name, device, deadline) for name in names or OPS}
    return each(prove, calls, deadline, workers)


def never_launched(proofs: Iterable[Proof]) -> list[str]:
    """A line for each kernel that no op's parity launched: nothing is proven of it."""
    launched = set().union(*(proof.launched for proof in proofs))
    return [f"{name}: no check launches it" for name in sorted(KERNELS.keys() - launched)]


def memcheck(
    deadline: float, names: Iterable[str] | None = None, workers: int = WORKERS
) -> list[str] | None:
    """Check two test shapes of every op under compute-sanitizer; None if it is not installed."""
    tool = shutil.which(SANITIZER) or shutil.which(SANITIZER, path="/usr/local/cuda/bin")
    if tool is None:
        return None
    calls = {name: (tool, name, deadline) for name in names or OPS}
    found, failures = each(_memcheck, calls, deadline, workers)
    return [line for lines in found.values() for line in lines] + failures


def memcheck_cases(name: str) -> None:
    """Check an op at two test shapes, in the process that compute-sanitizer watches."""
    for label, shape in itertools.islice(self_test.shapes(OPS[name], full=False), 1, 3):
        case = self_test.check(OPS[name], label, shape, torch.bfloat16, "cuda")
        if not case.ok:
            raise SystemExit("\n".join(case.failures()))


def _memcheck(tool: str, name: str, deadline: float) -> list[str]:
    watched = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", MEMCHECK]
    # Without the caching allocator each tensor has its own block, so an access beyond it is found.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    return process(f"{name}: memcheck", [*watched, name], deadline, environment)[0]


def process(
    words: str, command: list[str], deadline: float, environment: Mapping[str, str] = os.environ
) -> tuple[list[str], str]:
    """Run a command in the clone; return a failure with its last lines, and its last line."""
    try:
        done = subprocess.run(
            command, cwd=results_files.PACKAGE.parent, env=environment,
            capture_output=True, text=True, timeout=max(deadline - time.monotonic(), 1),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [f"{words}: out of time"], "out of time"
    lines = (done.stdout + done.stderr).strip().splitlines()
    failures = [] if done.returncode == 0 else [f"{words}: exit {done.returncode}", *lines[-15:]]
    return failures, lines[-1] if lines else ""


def each(
    function: Callable[..., T], calls: Mapping[str, tuple[Any, ...]], deadline: float, workers: int
) -> tuple[dict[str, T], list[str]]:
    """Run each call in its own process; return the results, and a line for each without one."""
    found: dict[str, T] = {}
    failures: list[str] = []
    with (
        mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}),  # the processes inherit it
        ThreadPoolExecutor(min(workers, os.cpu_count() or 1)) as threads,
    ):
        futures = {n: threads.submit(_alone, function, call, deadline) for n, call in calls.items()}
        for name, future in futures.items():
            try:
                found[name] = future.result()
            except TimeoutError:
                failures.append(f"{name}: out of time")
            except Exception as error:  # raised in the process, or because it died
                failures.append(f"{name}: {type(error).__name__}: {error}")
    return found, failures


def _alone(function: Callable[..., T], call: tuple[Any, ...], deadline: float) -> T:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    # A pool of one process returns the result, and notices if the process dies.
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    future = pool.submit(function, *call)
    try:
        return future.result(left)
    except concurrent.futures.TimeoutError:  # the built-in one from Python 3.11 on
        raise TimeoutError from None
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
