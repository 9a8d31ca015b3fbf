"""``vlm-fast bench``: what is asked, whether it can be, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer

from vlm_fast import terminal
from vlm_fast.benchmarks import compare_results, machine, ops, providers, suite
from vlm_fast.cli.options import Exit
from vlm_fast.devtools.passes import MODES
from vlm_fast.ops.declaration import FLOATS, OPS
from vlm_fast.verification import results_files

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def main(
    *,
    sections: Sequence[str],
    op: Sequence[str],
    shape: Sequence[str],
    mode: Sequence[str],
    provider: Sequence[str],
    dtype: str | None,
    quick: bool,
    json_file: Path | None,
    csv_file: Path | None,
    save: bool,
    against: Path | None,
    allowed: float,
) -> int:
    """Measure, print, write; the exit code. Options are those of `vlm_fast.cli.main.bench`.

    Raises:
        typer.BadParameter: an option names what is not there, before anything is measured.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known("--section", sections, (*suite.SECTIONS, "all"))
    known("--mode", mode, MODES)
    known("--provider", provider, providers.NAMES)
    known("--dtype", [dtype] if dtype else [], tuple(DTYPES))
    named = [OPS[name] for name in op] or list(OPS.values())
    known("--shape", shape, tuple(dict.fromkeys(s for o in named for s in o.bench_shapes)))
    if quick and save:
        raise typer.BadParameter("quick results are not worth keeping", param_hint="--save")
    if save and not results_files.IN_CLONE:
        reason = "results are kept in a clone of the repository; write a file with --json"
        raise typer.BadParameter(reason, param_hint="--save")
    for hint, path in (("--json", json_file), ("--csv", csv_file)):
        if path is not None and (reason := terminal.why_not_writable(path)):
            raise typer.BadParameter(reason, param_hint=hint)
    old: dict[str, Any] = {}
    if against is not None:
        try:
            old = compare_results.read(against)
            reason = compare_results.why_not(old, machine.name(device))
        except ValueError as error:
            reason = str(error)
        if reason is not None:
            raise typer.BadParameter(f"{against}: {reason}", param_hint="--compare")
    path = machine.results_file(machine.name(device)) if save else json_file
    results = suite.run(
        list(suite.SECTIONS) if "all" in sections else list(dict.fromkeys(sections)),
        device=device,
        quick=quick,
        selection=ops.Selection(
            op or None, shape or None, mode or None, provider or None,
            DTYPES[dtype] if dtype else None,
        ),
        path=path,
    )  # fmt: skip
    if save and json_file is not None:
        machine.write(json_file, results)
    rows = results.get("ops", [])
    if csv_file is not None:
        terminal.write_csv(csv_file, rows)
    for line in results["failures"]:
        print(line)
    if not results["finished"]:
        return Exit.INTERRUPTED
    slower = compare_results.show(old, rows, allowed) if old else []
    return 1 if results["failures"] or slower else 0


def known(option: str, given: Sequence[str], names: Sequence[str]) -> None:
    for name in given:
        if name not in names:
            there = ", ".join(map(repr, names))
            raise typer.BadParameter(f"{name!r} is none of {there}", param_hint=option)
