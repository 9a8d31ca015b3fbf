"""``python -m vlm_fast.benchmarks.gpu``: all checks and times that need a GPU, in nine minutes.

The run has stages, each with a share of the time. Results are written after each stage, so a run
that ends early leaves the results so far. Exit codes: 0 ok, 1 a stage failed, 3 no GPU, no Triton
or no clone of the repository.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vlm_fast.benchmarks import machine
from vlm_fast.benchmarks.gpu_stages import STAGES, Results, Stage
from vlm_fast.devtools.telemetry import Telemetry
from vlm_fast.kernels import _triton
from vlm_fast.verification import results_files

TOTAL_SECONDS = 510.0
GRACE = 10.0


@contextlib.contextmanager
def limit(deadline: float, grace: float) -> Iterator[None]:
    """Raise TimeoutError ``grace`` seconds after the deadline, in code that does not check it."""

    def out_of_time(number: int, frame: object) -> None:
        raise TimeoutError("out of time")

    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 0) + grace)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collect the names of kernels that Triton compiles because they are not in its cache."""
    found: list[str] = []
    if not _triton.AVAILABLE:
        yield found
        return

    def note(*, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            found.append(metadata["name"])

    before = _triton.triton.knobs.compilation.listener
    _triton.triton.knobs.compilation.listener = note
    try:
        yield found
    finally:
        _triton.triton.knobs.compilation.listener = before


def run(
    device: str,
    path: Path,
    *,
    stages: tuple[Stage, ...] = STAGES,
    total: float = TOTAL_SECONDS,
    grace: float = GRACE,
) -> Results:
    """Run the stages, write what they find to ``path``, and return it."""
    end = time.monotonic() + total
    results: Results = {**machine.description(device), "stages": {}}
    for stage in stages:
        start = time.monotonic()
        record: dict[str, Any] = {"status": "ok", "failures": []}
        results["stages"][stage.name] = record
        if stage.needs_cuda and device == "cpu":
            record["status"] = "needs a GPU"
        elif start > end:
            record["status"] = "out of time"
        else:
            deadline = min(start + stage.seconds, end)
            with Telemetry(device if stage.timed else "cpu") as seen, compilations() as late:
                try:
                    with limit(deadline, grace):
                        failures = stage.run(results, device, deadline)
                except Exception as error:  # a stage that breaks must not take the others with it
                    failures = [f"{type(error).__name__}: {error}"]
            record |= {"telemetry": seen.summary()} if stage.timed else {}
            record |= {"status": "FAILED" if failures else "ok", "failures": failures}
            record["compiled_late"] = len(late)  # of what "compiling" should have found
        record["seconds"] = round(time.monotonic() - start, 1)
        print(f"{stage.name}: {record['status']} ({record['seconds']} s)", flush=True)
        for line in record["failures"]:
            print(f"  {line}")
        machine.write(path, results)
    return results


def main() -> int:
    if not torch.cuda.is_available():
        cause = "this torch is built without CUDA" if torch.version.cuda is None else "none is seen"
        print(
            f"vlm_fast.benchmarks.gpu needs a CUDA GPU: {cause} (see: vlm-fast env)",
            file=sys.stderr,
        )
        return 3
    if not _triton.AVAILABLE or _triton.INTERPRETED:
        print(
            "vlm_fast.benchmarks.gpu needs Triton, not interpreted (see: vlm-fast env)",
            file=sys.stderr,
        )
        return 3
    if not results_files.IN_CLONE:
        print("vlm_fast.benchmarks.gpu writes results into a clone", file=sys.stderr)
        return 3
    path = machine.results_file(machine.name("cuda"))
    results = run("cuda", path)
    if "OUT" in os.environ:  # where a borrowed machine hands files back
        shutil.copy(path, os.environ["OUT"])
    print(f"written: {path.name}")
    return 0 if all(stage["status"] == "ok" for stage in results["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
