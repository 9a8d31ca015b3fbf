"""The stages of the GPU run, in the order of their worth, and what each adds to the results."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from benchmarks import (
    anyres,
    flamingo,
    gpu_checks,
    gpu_configs,
    gpu_hopper,
    llava,
    mergers,
    ops,
    overhead,
    qformer,
    tokens,
)
from vlm_fast import evidence, selftest
from vlm_fast.op import OPS

MEMCHECK = "from benchmarks.gpu_stages import memcheck_cases; memcheck_cases()"
Results = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A function of results, device and deadline: adds to the results, returns its failures."""

    name: str
    seconds: float
    run: Callable[[Results, str, float], list[str]]
    needs_cuda: bool = True
    timed: bool = False


def parity(results: Results, device: str, deadline: float) -> list[str]:
    """Every op in three dtypes, at its test shapes and its named ones."""
    cases, finished = [], True
    for case in selftest.run(device=device):
        cases.append(case)
        if time.monotonic() > deadline:
            finished = False
            break
    summary = selftest.summarise(cases)
    if not finished:
        for name in OPS:
            entry = summary.setdefault(name, {"cases": 0, "dtypes": [], "failures": []})
            entry["failures"].append(f"{name}: out of time")
    results["parity"] = summary
    return [line for entry in summary.values() for line in entry["failures"]]


def every_config(results: Results, device: str, deadline: float) -> list[str]:
    failures = gpu_checks.every_config(device, deadline)
    for name, entry in results.get("parity", {}).items():
        entry["failures"] += [line for line in failures if line.startswith(f"{name} ")]
    return failures


def hopper_gemms(results: Results, device: str, deadline: float) -> list[str]:
    """Every config of the optional library, where there is one."""
    cause = gpu_hopper.why_left_out(device)
    if cause is not None:
        results["hopper_gemms"] = f"left out: {cause}"
        return []
    failures = gpu_hopper.prove(device, deadline)
    results["hopper_gemms"] = "FAILED" if failures else "proven"
    for name in gpu_hopper.OPS_WITH_GEMMS:  # what is wrong with a GEMM is wrong with both
        if name in results.get("parity", {}):
            results["parity"][name]["failures"] += failures
    return failures


def configs(results: Results, device: str, deadline: float) -> list[str]:
    """Times of every config, and the table of the winners if all of them are right."""
    if results["stages"].get("every config", {}).get("status") != "ok":
        return ["no table: not every config is proven"]
    proven = results.get("hopper_gemms") == "proven"
    rows = gpu_hopper.measure(device, deadline) if proven else []
    rows += gpu_configs.measure(device, deadline)
    results["configs"] = rows
    if rows and device != "cpu":
        results["config_table"] = gpu_configs.write(rows).name
    return []


def check(function: Callable[[str], list[str]]) -> Callable[[Results, str, float], list[str]]:
    return lambda results, device, deadline: function(device)


def large(results: Results, device: str, deadline: float) -> list[str]:
    if device != "cpu" and torch.cuda.mem_get_info()[0] < gpu_checks.LARGE_BYTES:
        results["large"] = f"left out: less than {gpu_checks.LARGE_BYTES / 2**30:.0f} GiB free"
        return []
    return gpu_checks.large(device)


def suites(results: Results, device: str, deadline: float) -> list[str]:
    """The test suites for a GPU, where pytest is installed."""
    if importlib.util.find_spec("pytest") is None:
        results["suites"] = "left out: pytest is not installed"
        return []
    return _process(["-m", "pytest", "-q", "-x", "tests/gpu"], {}, deadline, results, "suites")


def memcheck(results: Results, device: str, deadline: float) -> list[str]:
    """A reduced parity run under compute-sanitizer, every allocation for itself."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None:
        results["memcheck"] = "left out: compute-sanitizer is not on PATH"
        return []
    # In one block of the caching allocator, no access is out of bounds.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    before = [tool, "--tool", "memcheck", "--error-exitcode", "9"]
    return _process(["-c", MEMCHECK], environment, deadline, results, "memcheck", before)


def memcheck_cases() -> None:
    """Two test shapes of every op in bf16; what compute-sanitizer watches."""
    for op in OPS.values():
        for label, shape in itertools.islice(selftest.shapes(op, full=False), 1, 3):
            case = selftest.check(op, label, shape, torch.bfloat16, "cuda")
            if not case.ok:
                raise SystemExit("\n".join(case.failures()))


def _process(
    arguments: list[str],
    environment: dict[str, str],
    deadline: float,
    results: Results,
    name: str,
    before: list[str] | None = None,
) -> list[str]:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    command = [*(before or []), sys.executable, *arguments]
    try:
        done = subprocess.run(
            command, cwd=evidence.PACKAGE.parent, env={**os.environ, **environment},
            capture_output=True, text=True, timeout=max(deadline - time.monotonic(), 1),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        results[name] = "out of time"
        return [f"{name}: out of time"]
    lines = (done.stdout + done.stderr).strip().splitlines()
    results[name] = lines[-1] if lines else ""
    return [] if done.returncode == 0 else [f"{name}: exit {done.returncode}", *lines[-15:]]


def benchmark_ops(results: Results, device: str, deadline: float) -> list[str]:
    results["ops"] = rows = []
    for row in ops.measure(
        OPS, quick=device == "cpu", device=device, seconds=0.4, compile_all=False
    ):
        rows.append(row)
        if time.monotonic() > deadline:
            return ["out of time"]
    ops.show(rows, device)
    return []


def benchmark_llava(results: Results, device: str, deadline: float) -> list[str]:
    results["llava"] = found = llava.main(device=device, quick=device == "cpu", seconds=4.0)
    return [] if found["proof"]["verified"] else ["the patched LLaVA is not the same"]


def benchmark_qformer(results: Results, device: str, deadline: float) -> list[str]:
    results["qformer"] = found = qformer.main(
        device=device, quick=device == "cpu", seconds=16.0, deadline=deadline
    )
    return [] if found["finished"] else ["out of time"]


def family(module: ModuleType, seconds: float) -> Callable[[Results, str, float], list[str]]:
    """A benchmark of pieces before and after."""

    def run(results: Results, device: str, deadline: float) -> list[str]:
        found = module.main(
            device=device, quick=device == "cpu", seconds=seconds, deadline=deadline
        )
        results[module.__name__.rpartition(".")[2]] = found
        return [] if found["finished"] else ["out of time"]

    return run


def benchmark_overhead(results: Results, device: str, deadline: float) -> list[str]:
    results["overhead"] = overhead.main(device=device, quick=True)
    return []


# What comes last is lost where time runs out.
STAGES = (
    Stage("parity", 150, parity, needs_cuda=False),
    Stage("repeats", 20, check(gpu_checks.repeats), needs_cuda=False),
    Stage("no synchronisation", 10, check(gpu_checks.no_synchronisation)),
    Stage("CUDA graphs", 20, check(gpu_checks.cuda_graphs)),
    Stage("side stream", 10, check(gpu_checks.side_stream)),
    Stage("every config", 80, every_config),
    Stage("Hopper GEMMs", 50, hopper_gemms),
    Stage("configs", 80, configs, timed=True),
    Stage("LLaVA", 110, benchmark_llava, needs_cuda=False, timed=True),
    Stage("Q-Former", 110, benchmark_qformer, needs_cuda=False, timed=True),
    Stage("Flamingo", 70, family(flamingo, 5.0), needs_cuda=False, timed=True),
    Stage("AnyRes", 30, family(anyres, 2.0), needs_cuda=False, timed=True),
    Stage("mergers", 30, family(mergers, 2.0), needs_cuda=False, timed=True),
    Stage("tokens", 30, family(tokens, 3.0), needs_cuda=False, timed=True),
    Stage("ops", 130, benchmark_ops, needs_cuda=False, timed=True),
    Stage("overhead", 20, benchmark_overhead, needs_cuda=False, timed=True),
    Stage("large", 30, large),
    Stage("suites", 120, suites),
    Stage("memcheck", 90, memcheck),
)
