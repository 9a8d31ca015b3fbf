"""``vlm-fast tune``: measure which configs win on this GPU, and write the user's table of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from vlm_fast import terminal
from vlm_fast.cli.options import Exit, Json, OpOption, print_json, stop
from vlm_fast.devtools import tuning
from vlm_fast.kernels import _configs, _triton, _user_table
from vlm_fast.kernels._launcher import KERNELS


class Dtype(str, Enum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


DTYPES = {
    Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16, Dtype.fp32: torch.float32,
}  # fmt: skip


def tune(
    op: OpOption = None,
    dtype: Annotated[
        list[Dtype] | None, typer.Option(help="May be repeated; bf16 and fp32 by default.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1.0, help="At most, proof and measurement together.")
    ] = 600.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be measured; needs no GPU.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the user tables.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the user tables.")] = False,
    as_json: Json = False,
) -> None:
    """Measure which config of each kernel is fastest on this GPU; write the user's table.

    Every config is first proven right, and wrong ones are left out. Launches of later processes
    read the table, once; nothing else ever tunes. VLM_FAST_USER_TABLE=0 ignores it.
    """
    if dry_run + show + delete > 1:
        raise typer.BadParameter("--dry-run, --show and --delete exclude each other")
    try:
        directory = _user_table.directory()
    except ValueError as error:
        stop(Exit.USAGE, str(error))
    if show or delete:
        _stored(directory, delete, as_json)
        return
    if not _triton.AVAILABLE or _triton.INTERPRETED:
        lack = "TRITON_INTERPRET=1 is set" if _triton.INTERPRETED else "Triton is not installed"
        stop(Exit.ENVIRONMENT, f"there are no kernels to measure: {lack} (see: vlm-fast env)")
    names, dtypes = [op] if op else None, [DTYPES[d] for d in dtype or (Dtype.bf16, Dtype.fp32)]
    if dry_run:
        _plan(names, dtypes, directory, as_json)
        return
    if not torch.cuda.is_available():
        stop(Exit.ENVIRONMENT, "no GPU is seen, and tuning measures one (see: vlm-fast env)")
    try:
        tuning.private_directory()  # said before the work, not after it
    except PermissionError as error:
        stop(Exit.ENVIRONMENT, str(error))
    report = _measure(names, dtypes, time.monotonic() + seconds)
    if as_json:
        print_json(report)
    else:
        _print(report)
    if report["table"] is None or report["default_wrong"]:
        raise typer.Exit(Exit.FAILURE)


def _measure(names: list[str] | None, dtypes: list[torch.dtype], deadline: float) -> dict[str, Any]:
    candidates = []
    try:
        with terminal.counter("proving") as count:
            for candidate in tuning.prove(names, dtypes=dtypes, deadline=deadline, progress=count):
                candidates.append(candidate)
    except RuntimeError as error:
        stop(Exit.FAILURE, f"{error}; nothing was written")
    right: dict[str, list[int]] = {}
    for candidate in candidates:
        if not candidate.failures:
            right.setdefault(candidate.kernel, []).append(candidate.config)
    with terminal.counter("measuring") as count:
        rows, finished = tuning.measure(
            right, names, dtypes=dtypes, deadline=deadline, progress=count
        )
    gpu = torch.cuda.get_device_name()
    name = _configs.table_name(torch.cuda.get_device_capability(), gpu)
    chosen = tuning.selection(rows)
    left_out = [c for c in candidates if c.failures]
    unproven = sorted(set(tuning.launched_by(names)) - {c.kernel for c in candidates})
    table = None
    if chosen:
        try:
            table = str(tuning.write(name, gpu, chosen))
        except (OSError, ValueError) as error:
            stop(Exit.ENVIRONMENT, f"the table could not be written: {error}")
    return {
        "gpu": gpu,
        "table": table,
        "finished": finished and not unproven,
        "kernels": chosen,
        "rows": rows,
        "left_out": [
            {"kernel": c.kernel, "config": c.config, "failures": c.failures} for c in left_out
        ],
        "not_reached": unproven,
        "default_wrong": [
            c.kernel for c in left_out if c.config == 0 and "out of time" not in c.failures
        ],
    }


def _print(report: dict[str, Any]) -> None:
    cells = []
    times = {(r["kernel"], r["dtype"], r["size"], r["config"]): r["median"] for r in report["rows"]}
    for kernel, by_dtype in report["kernels"].items():
        for dtype, by_size in by_dtype.items():
            for size, index in by_size.items():
                first, best = (times[kernel, dtype, int(size), i] for i in (0, index))
                gain = f"{first / best:.2f}x" if index else "the default"
                cells.append(
                    (kernel, dtype, size, index, f"{first * 1e6:.1f}", f"{best * 1e6:.1f}", gain)
                )
    columns = ("kernel", "dtype", "size", "config", "default, us", "chosen, us", "")
    terminal.show(f"configs on {report['gpu']}", columns, cells)
    for left in report["left_out"]:
        print(f"left out: {left['kernel']}, config {left['config']}: {left['failures'][0]}")
    for kernel in report["default_wrong"]:
        print(f"{kernel} is wrong with its default config too: see vlm-fast check")
    if not report["finished"]:
        print("out of time: the other kernels and shapes keep their configs; see --seconds")
    if report["table"] is None:
        print("nothing was measured, so nothing was written")
    else:
        print(f"written: {report['table']}")


def _plan(
    names: list[str] | None, dtypes: list[torch.dtype], directory: Path, as_json: bool
) -> None:
    gpu = torch.cuda.is_available()
    file = "<sm>_<gpu>.json"
    if gpu:
        file = _configs.table_name(torch.cuda.get_device_capability(), torch.cuda.get_device_name())
    rows = [
        {
            "kernel": kernel,
            "configs": len(KERNELS[kernel].configs),
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in dtypes],
            "proven_by": ops,
        }
        for kernel, ops in tuning.launched_by(names).items()
    ]
    if as_json:
        print_json({"table": str(directory / file), "kernels": rows})
        return
    cells = [[" ".join(v) if isinstance(v, list) else v for v in row.values()] for row in rows]
    terminal.show("would be measured", ("kernel", "configs", "dtypes", "proven by"), cells)
    print(f"would be written: {directory / file}")


def _stored(directory: Path, delete: bool, as_json: bool) -> None:
    """Print the tables of the directory, or delete them, whatever they hold."""
    paths = sorted(directory.glob("sm_*.json")) if directory.is_dir() else []
    try:
        reason = _user_table.distrust(directory)
    except FileNotFoundError:
        reason = ""
    if reason:
        stop(Exit.ENVIRONMENT, reason)
    rows = []
    for path in paths:
        if delete:
            path.unlink(missing_ok=True)
            rows.append({"table": str(path), "deleted": True})
            continue
        found = _user_table.load(path, _configs.SOURCES)
        rows.append(
            {
                "table": str(path),
                "digest": found.digest,
                "kernels": found.kernels,
                "stale": found.stale,
                "reason": found.reason,
            }
        )
    if as_json:
        print_json(rows)
    elif not rows:
        print(f"there are no user tables in {directory}")
    elif delete:
        print("\n".join(f"deleted: {row['table']}" for row in rows))
    else:
        _print_stored(rows)


def _print_stored(rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        cells = [
            (kernel, dtype, json.dumps(sizes))
            for kernel, by_dtype in row["kernels"].items()
            for dtype, sizes in by_dtype.items()
        ]
        terminal.show(f"{row['table']} {row['digest']}", ("kernel", "dtype", "size: config"), cells)
        if row["stale"]:
            print(f"measured at another source, not used: {', '.join(row['stale'])}")
        if row["reason"]:
            print(row["reason"])
