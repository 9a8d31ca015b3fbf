"""The stages of the GPU run, the most important first, and what each adds to the results."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from vlm_fast.benchmarks import (
    anyres_packing,
    gated_cross_attention,
    gpu_checks,
    gpu_compile,
    gpu_hopper,
    gpu_library_attention,
    gpu_ops,
    gpu_proof,
    image_token_merge,
    models,
    op_overhead,
    ops,
    patch_mergers,
    qformer,
    token_merging,
)
from vlm_fast.benchmarks.host import measure as host

Results = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A stage: ``run(results, device, deadline)`` adds to the results and returns its failures."""

    name: str
    seconds: float
    run: Callable[[Results, str, float], list[str]]
    needs_cuda: bool = True
    timed: bool = False


def compiling(results: Results, device: str, deadline: float) -> list[str]:
    """Compile the kernels of the other stages, on all cores."""
    major, minor = torch.cuda.get_device_capability()
    results["compiled"], failures = gpu_compile.compile_all(f"sm_{major}{minor}", deadline)
    return failures


def proof(results: Results, device: str, deadline: float) -> list[str]:
    """Every op in three dtypes at its test shapes and its named ones, and all that it must keep."""
    proofs, failures = gpu_proof.prove_all(device, deadline)
    results["parity"] = {name: found.parity for name, found in proofs.items()}
    if device != "cpu":
        failures += gpu_proof.never_launched(proofs.values())
    checks: dict[str, str] = {}
    for found in proofs.values():
        failures += found.parity["failures"]
        for check, lines in found.failures.items():
            failures += [f"{check}: {line}" for line in lines]
            checks[check] = "FAILED" if lines or checks.get(check) == "FAILED" else "ok"
        found.parity["failures"] += [line for lines in found.failures.values() for line in lines]
    results["checks"] = checks
    return failures


def hopper_gemms(results: Results, device: str, deadline: float) -> list[str]:
    """The optional GEMMs, where they are built."""
    cause = gpu_hopper.why_left_out(device)
    if cause is not None:
        results["hopper_gemms"] = f"left out: {cause}"
        return []
    failures = gpu_hopper.prove(device, deadline)
    results["hopper_gemms"] = "FAILED" if failures else "proven"
    if "mlp" in results.get("parity", {}):
        results["parity"]["mlp"]["failures"] += failures
    return failures


def large(results: Results, device: str, deadline: float) -> list[str]:
    if device != "cpu" and torch.cuda.mem_get_info()[0] < gpu_checks.LARGE_BYTES:
        results["large"] = f"left out: less than {gpu_checks.LARGE_BYTES / 2**30:.0f} GiB free"
        return []
    return gpu_checks.large(device)


def suites(results: Results, device: str, deadline: float) -> list[str]:
    """Run the tests for a GPU, if pytest is installed."""
    if importlib.util.find_spec("pytest") is None:
        results["suites"] = "left out: pytest is not installed"
        return []
    torch.cuda.empty_cache()
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--device", "cuda"]
    failures, results["suites"] = gpu_proof.process("suites", command, deadline)
    return failures


def memcheck(results: Results, device: str, deadline: float) -> list[str]:
    """Check some shapes of every op under compute-sanitizer, without the caching allocator."""
    failures = gpu_proof.memcheck(deadline)
    if failures is None:
        results["memcheck"] = f"left out: {gpu_proof.SANITIZER} is not on PATH"
        return []
    results["memcheck"] = "FAILED" if failures else "no error"
    return failures


def benchmark_ops(results: Results, device: str, deadline: float) -> list[str]:
    results["ops"] = rows = []
    failures = gpu_ops.measure(device, deadline, rows, quick=device == "cpu")
    ops.show(rows, device)
    return failures


def library_attention(results: Results, device: str, deadline: float) -> list[str]:
    """What decides whether a library may serve plain attention; nothing here is a failure."""
    results["library_attention"] = gpu_library_attention.evidence(
        device, deadline, quick=device == "cpu"
    )
    return []


def model(name: str) -> Callable[[Results, str, float], list[str]]:
    """A stage that measures a whole model before and after the patch."""

    def run(results: Results, device: str, deadline: float) -> list[str]:
        found = models.main(
            [name], device=device, quick=device == "cpu", seconds=2.0, deadline=deadline
        )
        results.setdefault("models", {}).update(found)
        if name not in found or not found[name]["finished"]:
            return ["out of time"]
        verified = found[name]["proof"]["verified"]
        return [] if verified else [f"the patched {found[name]['model']} is not the same"]

    return run


def family(module: ModuleType, seconds: float) -> Callable[[Results, str, float], list[str]]:
    """A stage that measures pieces of models before and after the patch."""

    def run(results: Results, device: str, deadline: float) -> list[str]:
        found = module.main(
            device=device, quick=device == "cpu", seconds=seconds, deadline=deadline
        )
        results[module.__name__.rpartition(".")[2]] = found
        return [] if found["finished"] else ["out of time"]

    return run


def host_time(results: Results, device: str, deadline: float) -> list[str]:
    """Host time of connectors of every kind in plain eager mode, against the unpatched ones."""
    found = host.main(host.FEW, batches=(1, 2, 8), device=device, deadline=deadline)
    results["host"] = found
    return [] if found["finished"] else ["out of time"]


def benchmark_overhead(results: Results, device: str, deadline: float) -> list[str]:
    results["op_overhead"] = op_overhead.main(device=device, quick=True)
    return []


# The seconds are those of an H200 with 16 cores. If time runs out, the last stages do not run.
# Together they fill the whole time; "suites" takes what is left.
STAGES = (
    Stage("compiling", 70, compiling),
    Stage("proof", 70, proof, needs_cuda=False),
    Stage("Hopper GEMMs", 10, hopper_gemms),
    Stage("ops", 105, benchmark_ops, needs_cuda=False, timed=True),
    Stage("library attention", 8, library_attention, needs_cuda=False),
    Stage("LLaVA", 25, model("llava"), needs_cuda=False, timed=True),
    Stage("Flamingo", 20, family(gated_cross_attention, 1.0), needs_cuda=False, timed=True),
    Stage("Q-Former", 25, family(qformer, 1.0), needs_cuda=False, timed=True),
    Stage("merge", 4, family(image_token_merge, 0.5), needs_cuda=False, timed=True),
    Stage("AnyRes", 10, family(anyres_packing, 1.0), needs_cuda=False, timed=True),
    Stage("mergers", 14, family(patch_mergers, 1.0), needs_cuda=False, timed=True),
    Stage("host", 30, host_time, timed=True),
    Stage("tokens", 14, family(token_merging, 1.0), needs_cuda=False, timed=True),
    Stage("BLIP-2", 18, model("blip2"), needs_cuda=False, timed=True),
    Stage("IDEFICS", 18, model("idefics"), needs_cuda=False, timed=True),
    Stage("Llama 3.2 Vision", 18, model("mllama"), needs_cuda=False, timed=True),
    Stage("overhead", 4, benchmark_overhead, needs_cuda=False, timed=True),
    Stage("large", 12, large),
    Stage("memcheck", 30, memcheck),
    Stage("suites", 120, suites),
)
