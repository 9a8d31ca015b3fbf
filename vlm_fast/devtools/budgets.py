"""Resource budgets of compiled kernels: a lock file of registers, shared memory and wide accesses.

``python -m vlm_fast.devtools.budgets`` compiles every kernel for every architecture and rewrites
``budgets.json``: missing entries are added, entries of deleted kernels are removed. With
``--check`` it writes nothing, and fails if an entry is missing, exceeded or of a deleted kernel.
Both need the compiler that the file is for, Triton `BUDGETS_TRITON`.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from vlm_fast import terminal
from vlm_fast.devtools import ahead_of_time
from vlm_fast.devtools.ahead_of_time import Resources
from vlm_fast.devtools.environment import version_of

Budgets = Mapping[str, Mapping[str, Mapping[str, int]]]

BUDGETS = Path(__file__).resolve().parent / "budgets.json"
BUDGETS_TRITON = "3.6.0"  # other releases of the compiler allocate other registers
AT_MOST = ("registers", "shared_bytes")
AT_LEAST = ("wide_loads", "wide_stores", "tensor_core")  # in bf16 and fp16
REGISTER_UNIT, MAX_REGISTERS = 8, 255  # registers of a thread are allocated in such units
DEFAULT_SHARED_BYTES = 48 * 1024  # leaves room for several blocks on a multiprocessor of any GPU
MAX_SHARED_BYTES = 227 * 1024  # the most that one block can have on sm_90 and sm_100


def read() -> Budgets:
    """The budgets that are shipped: ``{kernel: {arch: {name of a count: bound}}}``."""
    return json.loads(BUDGETS.read_text())


def measured(resources: Iterable[Resources]) -> dict[str, dict[str, dict[str, int]]]:
    """The tightest budgets that these builds keep to, in the order of the file.

    Counts in `AT_MOST` are bounded by their largest value over all builds of a kernel. Counts in
    `AT_LEAST` are bounded by their smallest value over the builds in bf16 and fp16, and left out
    if that is 0.
    """
    grouped: dict[str, dict[str, list[Resources]]] = {}
    for r in resources:
        grouped.setdefault(r.kernel, {}).setdefault(r.arch, []).append(r)
    return {
        kernel: {arch: _bounds(grouped[kernel][arch]) for arch in _in_order(grouped[kernel])}
        for kernel in sorted(grouped)
    }


def _bounds(builds: list[Resources]) -> dict[str, int]:
    bounds = {name: max(getattr(r, name) for r in builds) for name in AT_MOST}
    units = math.ceil(bounds["registers"] / REGISTER_UNIT)
    bounds["registers"] = min(units * REGISTER_UNIT, MAX_REGISTERS)
    half = [r for r in builds if _is_half(r)]
    least = {name: min((getattr(r, name) for r in half), default=0) for name in AT_LEAST}
    return bounds | {name: bound for name, bound in least.items() if bound}


def violations(resources: Iterable[Resources], budgets: Budgets | None = None) -> list[str]:
    """One sentence for each budget that a build exceeds or that is missing.

    No kernel may spill registers, whatever its budget says.

    Args:
        resources: of the builds to check.
        budgets: ``{kernel: {arch: {name of a count: bound}}}``; None reads those of the package.
    """
    budgets = read() if budgets is None else budgets
    found = []
    for r in resources:
        if r.stack_bytes or r.spills:
            found.append(f"{r}: spills ({r.stack_bytes} bytes of stack, {r.spills} instructions)")
        ceiling = MAX_SHARED_BYTES if r.config else DEFAULT_SHARED_BYTES
        if r.shared_bytes > ceiling:
            found.append(f"{r}: {r.shared_bytes} bytes of shared memory, at most {ceiling}")
        bounds = budgets.get(r.kernel, {}).get(r.arch)
        if bounds is None:
            found.append(f"{r.kernel} has no budget on {r.arch}")
            continue
        for name, bound in bounds.items():
            value = getattr(r, name)
            if value > bound if name in AT_MOST else _is_half(r) and value < bound:
                limit = "at most" if name in AT_MOST else "at least"
                found.append(f"{r}: {name} {value}, {limit} {bound}")
    return list(dict.fromkeys(found))


def stale(resources: Iterable[Resources], budgets: Budgets) -> list[str]:
    """One sentence for each budget of a kernel and architecture that ``resources`` do not have."""
    built = {(r.kernel, r.arch) for r in resources}
    return [
        f"{kernel} has a budget on {arch}, but no op launches it"
        for kernel, archs in budgets.items()
        for arch in archs
        if (kernel, arch) not in built
    ]


def as_text(budgets: Budgets) -> str:
    """JSON with one line per kernel and architecture, so that a diff shows which ones changed."""
    kernels = []
    for kernel in sorted(budgets):
        archs = budgets[kernel]
        lines = [f"  {json.dumps(arch)}: {json.dumps(archs[arch])}" for arch in _in_order(archs)]
        kernels.append(f" {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def _in_order(archs: Iterable[str]) -> list[str]:
    return sorted(archs, key=lambda arch: (len(arch), arch))  # sm_90 before sm_100


def _is_half(r: Resources) -> bool:
    return re.search(r"\b(bf16|fp16)\b", r.signature) is not None


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 if budgets do not hold.")
    ] = False,
) -> None:
    """Compile every kernel for every architecture, and write or check budgets.json."""
    version = version_of("triton")
    if version != BUDGETS_TRITON:
        print(f"budgets: need triton {BUDGETS_TRITON}, found {version}", file=sys.stderr)
        raise typer.Exit(3)
    with terminal.counter("compiling") as count:
        found = ahead_of_time.compile_all(progress=count)
    if not check:
        BUDGETS.write_text(as_text(measured(found)))
        # Rules that no budget can relax: spills, and the shared memory that a block can have.
        broken = violations(found)
    else:
        budgets = read()
        broken = violations(found, budgets) + stale(found, budgets)
    for line in broken:
        print(line)
    if broken:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
