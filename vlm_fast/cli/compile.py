"""``vlm-fast compile``: resources of compiled kernels, and their predicted device time."""

from __future__ import annotations

import sys
from dataclasses import asdict, astuple, fields
from typing import Annotated

import typer

from vlm_fast import terminal
from vlm_fast.cli.options import Exit, Json, OpOption, print_json, stop
from vlm_fast.devtools import ahead_of_time, budgets, environment
from vlm_fast.devtools.device_time import report as device_time_report
from vlm_fast.devtools.device_time.calibration import read_calibration
from vlm_fast.kernels import _triton
from vlm_fast.ops.declaration import OPS


def compile_(
    arch: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_90, gfx942, ...; may be repeated.")
    ] = None,
    op: OpOption = None,
    as_json: Json = False,
    check: Annotated[
        bool, typer.Option(help="Fail if a budget (of Triton 3.6) is exceeded.")
    ] = False,
    report: Annotated[
        bool,
        typer.Option("--report", help="Predict device time on an H200, and say what limits it."),
    ] = False,
) -> None:
    """Compile every kernel for GPUs that need not be here; print registers, spills, memory.

    With --report, print the device time of every op on an H200 that a model predicts from counts
    in compiled code, the farthest from the least possible time first.
    """
    if not _triton.AVAILABLE or _triton.INTERPRETED:
        lack = "TRITON_INTERPRET=1 is set" if _triton.INTERPRETED else "Triton is not installed"
        stop(Exit.ENVIRONMENT, f"nothing can be compiled: {lack}")
    archs, names = arch or ahead_of_time.ARCHS, [op] if op else None
    if report:
        if check or archs not in (ahead_of_time.ARCHS, [device_time_report.ARCH]):
            stop(Exit.USAGE, f"--report is of {device_time_report.ARCH} alone, without --check")
        show_report(names, as_json)
        return
    try:
        with terminal.counter("compiling") as count:
            found = ahead_of_time.compile_all(archs, ops=names, progress=count)
    except ValueError as error:
        stop(Exit.USAGE, str(error))
    broken = budgets.violations(found) if check else []
    if as_json:
        print_json({"kernels": [asdict(row) for row in found], "violations": broken})
    else:
        columns = [field.name for field in fields(ahead_of_time.Resources)]
        terminal.show("kernels", columns, [astuple(row) for row in found])
        for line in broken:
            print(line)
    version = environment.version_of("triton")
    comparable = version == budgets.BUDGETS_TRITON
    if check and not comparable:
        compilers = f"budgets are of Triton {budgets.BUDGETS_TRITON}, and this is {version}"
        print(f"vlm-fast: {compilers}: registers may differ, nothing is refused", file=sys.stderr)
    if (broken and comparable) or not found:
        raise typer.Exit(Exit.FAILURE)


def show_report(names: list[str] | None, as_json: bool) -> None:
    """Print the predicted device time of the passes of these ops, or of all."""
    with terminal.counter("compiling") as count:
        found = device_time_report.report(names, progress=count)
    error = read_calibration()["left_out_error"]["vlm_fast"]
    if as_json:
        print_json({"passes": [asdict(row) for row in found], "left_out_error": error})
        return
    columns = ("op", "shape", "pass", "predicted", "floor", "share", "launches", "spent on",
               "mostly in", "measured", "best peer")  # fmt: skip
    cells = [
        (
            row.op, row.shape, row.mode, f"{row.predicted:.1f}", f"{row.floor:.1f}",
            f"{row.floor / row.predicted:.0%}", row.launches, _causes(row), row.kernel,
            "" if row.measured is None else f"{row.measured:.1f}",
            f"{row.peer} {row.peer_measured:.1f}" if row.peer else "",
        )
        for row in found
    ]  # fmt: skip
    terminal.show("device time on an H200, bf16, in microseconds", columns, cells)
    by_op = [(op, f"{value:.0%}") for op, value in error["median_by_op"].items()]
    terminal.show("error of the model for an op left out of its fit", ("op", "median"), by_op)
    if missing := set(names or OPS) - {row.op for row in found}:
        print(f"Not counted, because they compute in parts that need data: {', '.join(missing)}.")
    print(
        "Predicted by a model, not measured: of an op that its constants have not seen it is "
        f"{error['median']:.0%} off (median of {error['rows']} passes), one in ten more than "
        f"{error['ninetieth_percentile']:.0%}.\nMeasured are the kernels of the results "
        "file, which may be older than these."
    )


def _causes(row: device_time_report.Pass, count: int = 2) -> str:
    """The largest causes with their shares of the predicted time."""
    largest = list(row.causes.items())[:count]
    return ", ".join(f"{cause} {time / row.predicted:.0%}" for cause, time in largest)
