"""The command ``vlm-fast bench``: it checks the options, runs the benchmark and returns a code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer

from vlm_fast import terminal
from vlm_fast.benchmarks import compare_results, machine, ops, providers, short_run, suite
from vlm_fast.cli.options import Exit
from vlm_fast.devtools.passes import MODES
from vlm_fast.ops.declaration import DTYPES, OPS
from vlm_fast.verification import results_files


def main(
    *,
    full: bool,
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
    """Measure, print and write files; the options are those of `vlm_fast.cli.main.bench`.

    Returns:
        The exit code.

    Raises:
        typer.BadParameter: an option has a wrong value; nothing was measured.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_names("--section", sections, (*suite.SECTIONS, "all"))
    check_names("--mode", mode, MODES)
    check_names("--provider", provider, providers.NAMES)
    check_names("--dtype", [dtype] if dtype else [], tuple(DTYPES))
    named = [OPS[name] for name in op] or list(OPS.values())
    check_names("--shape", shape, tuple(dict.fromkeys(s for o in named for s in o.bench_shapes)))
    if quick and save:
        raise typer.BadParameter("quick results are not worth keeping", param_hint="--save")
    if save and not results_files.IN_CLONE:
        reason = "results are kept in a clone of the repository; write a file with --json"
        raise typer.BadParameter(reason, param_hint="--save")
    for hint, path in (("--json", json_file), ("--csv", csv_file)):
        if path is not None and (reason := terminal.why_not_writable(path)):
            raise typer.BadParameter(reason, param_hint=hint)
    old = earlier_results(against, machine.name(device)) if against is not None else {}
    path = machine.results_file(machine.name(device)) if save else json_file
    everything = full or "all" in sections
    chosen = list(suite.SECTIONS if everything else dict.fromkeys(sections))
    if chosen or quick or save or old or op or shape or mode or provider or dtype:
        results = suite.run(
            chosen or ["ops"],
            device=device,
            quick=quick,
            selection=ops.Selection(
                op or None, shape or None, mode or None, provider or None,
                DTYPES[dtype] if dtype else None,
            ),
            path=path,
        )  # fmt: skip
    else:
        results = short_run.main(device, path)
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


def earlier_results(path: Path, machine_name: str) -> dict[str, Any]:
    """The results file of ``--compare``.

    Raises:
        typer.BadParameter: it cannot be read, or was not measured on this machine.
    """
    try:
        old = compare_results.read(path)
        reason = compare_results.why_not(old, machine_name)
    except ValueError as error:
        old, reason = {}, str(error)
    if reason is not None:
        raise typer.BadParameter(f"{path}: {reason}", param_hint="--compare")
    return old


def check_names(option: str, given: Sequence[str], names: Sequence[str]) -> None:
    """Raise typer.BadParameter for the first given name that is not among ``names``."""
    for name in given:
        if name not in names:
            known = ", ".join(map(repr, names))
            raise typer.BadParameter(f"{name!r} is none of {known}", param_hint=option)
