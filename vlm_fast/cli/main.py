"""The command ``vlm-fast``. Exit codes: 0 ok, 1 failure, 2 usage, 3 environment."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from vlm_fast import terminal
from vlm_fast.cli.advise import advise
from vlm_fast.cli.data import data
from vlm_fast.cli.options import Exit, Json, OpArgument, OpOption, known_op, print_json, stop
from vlm_fast.cli.profile import profile
from vlm_fast.cli.recipe import recipe
from vlm_fast.devtools import ahead_of_time, environment, roofline_report
from vlm_fast.devtools.occupancy import GPUS
from vlm_fast.kernels import _native, _triton
from vlm_fast.ops.declaration import FLOATS, OPS, Op
from vlm_fast.verification import results_files, self_test

# rich's markup mode would draw boxes into pipes.
app = typer.Typer(
    help="Fused kernels between a vision encoder and a language model.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)


@app.command()
def env(as_json: Json = False) -> None:
    """Versions, GPUs, and what is missing, why, and what to do about it."""
    facts = list(environment.facts())
    if as_json:
        print_json([asdict(fact) for fact in facts])
        return
    terminal.show("environment", ("", "found"), [(fact.name, fact.value) for fact in facts])
    for fact in facts:
        if fact.cause:
            print(f"{fact.name}: {fact.cause}\n  remedy: {fact.remedy}")


@app.command()
def ops(as_json: Json = False) -> None:
    """The ops, and what results files prove of them."""
    results = results_files.read_results()
    rows = []
    for op in OPS.values():
        proofs = results_files.proofs(op, results)
        gpu = [str(p) for p in proofs if p.device == "cuda"]
        cpu = [str(p) for p in proofs if p.device == "cpu"]
        rows.append(
            {
                "op": op.name,
                "dtypes": _served_dtypes(op),
                "bench_shapes": list(op.bench_shapes),
                "gpu": gpu or ["never run on a GPU"],
                "cpu": cpu or ["no results file; run vlm-fast check"],
            }
        )
    if as_json:
        print_json(rows)
        return
    cells = [["; ".join(v) if isinstance(v, list) else v for v in row.values()] for row in rows]
    terminal.show("ops", ("op", "dtypes", "bench shapes", "GPU", "CPU path"), cells)


@app.command()
def check(op: OpArgument = None, as_json: Json = False) -> None:
    """Parity on this machine: every op against its reference in fp32, bf16 and fp16."""
    start = time.perf_counter()
    names = [op] if op else list(OPS)
    cuda = torch.cuda.is_available()
    if cuda and not _triton.AVAILABLE:
        stop(Exit.ENVIRONMENT, "Triton is not installed, so the GPU has no kernels to check")
    cases = []
    with terminal.counter("checking") as count:
        for case in self_test.run(names):
            cases.append(case)
            count(len(cases), None)
    summary = self_test.summarise(cases)
    failures = [line for case in cases for line in case.failures()]
    if as_json:
        print_json({"device": _device(cuda), "ok": not failures, "ops": summary})
    else:
        rows = [
            (name, s["cases"], " ".join(s["dtypes"]), f"{s['worst_share_of_budget']:.2f}",
             "FAILED" if s["failures"] else "ok")
            for name, s in summary.items()
        ]  # fmt: skip
        title = f"parity on {_device(cuda)}, {time.perf_counter() - start:.1f} s"
        terminal.show(title, ("op", "cases", "dtypes", "worst error / budget", ""), rows)
        for line in failures:
            print(line)
    if failures or not cases:
        raise typer.Exit(Exit.FAILURE)


@app.command()
def bench(
    quick: Annotated[
        bool, typer.Option(help="One small shape an op; within 3 minutes on two cores.")
    ] = False,
    section: Annotated[
        list[str] | None, typer.Option(help="parity, ops (the default), models, ..., or all.")
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="Only these ops; may be repeated.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Only these named shapes.")] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="forward, backward, forward+backward.")
    ] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="vlm_fast, eager, torch.compile, xformers, ...")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write results here, as they are found.")
    ] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write the ops' rows here.")
    ] = None,
    save: Annotated[
        bool, typer.Option(help="Write them to benchmarks/results/<machine>.json of a clone.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option("--compare", help="Exit 1 where slower than in this file.")
    ] = None,
    allowed: Annotated[
        float, typer.Option("--allow", min=0.0, help="How much slower is no regression.")
    ] = 0.05,
) -> None:
    """Time ops and models against eager PyTorch, torch.compile and other libraries, in turns.

    Exit codes: 1 also where something is slower than before, 130 where it was interrupted; what was
    measured by then is in the file.
    """
    for name in op or []:
        known_op(name)
    code = importlib.import_module("vlm_fast.benchmarks.cli").main(
        sections=section or ["ops"], op=op or [], shape=shape or [], mode=mode or [],
        provider=provider or [], dtype=dtype, quick=quick, json_file=json_file, csv_file=csv_file,
        save=save, against=against, allowed=allowed,
    )  # fmt: skip
    if code:
        raise typer.Exit(code)


@app.command(name="compile")
def compile_(
    arch: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_90, gfx942, ...; may be repeated.")
    ] = None,
    op: OpOption = None,
    as_json: Json = False,
    check: Annotated[bool, typer.Option(help="Fail where a kernel exceeds its budget.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Why ops could miss their targets, as Markdown.")
    ] = False,
) -> None:
    """Compile every kernel for GPUs that need not be here; print registers, spills, memory."""
    if not _triton.AVAILABLE or _triton.INTERPRETED:
        lack = "TRITON_INTERPRET=1 is set" if _triton.INTERPRETED else "Triton is not installed"
        stop(Exit.ENVIRONMENT, f"nothing can be compiled: {lack}")
    archs, names = arch or ahead_of_time.ARCHS, [op] if op else None
    if report:
        _print_static_report(arch or ["sm_90"], names, as_json)
        return
    try:
        with terminal.counter("compiling") as count:
            found = ahead_of_time.compile_all(archs, ops=names, progress=count)
    except ValueError as error:
        stop(Exit.USAGE, str(error))
    broken = list(ahead_of_time.violations(found)) if check else []
    if as_json:
        print_json({"kernels": [asdict(row) for row in found], "violations": broken})
    else:
        columns = [field.name for field in fields(ahead_of_time.Resources)]
        terminal.show("kernels", columns, [astuple(row) for row in found])
        for line in broken:
            print(line)
    version = environment.version_of("triton")
    if check and version != ahead_of_time.BUDGETS_TRITON:
        budgets = f"budgets are of Triton {ahead_of_time.BUDGETS_TRITON}, and this is {version}"
        print(f"vlm-fast: {budgets}: registers may differ", file=sys.stderr)
    if broken or not found:
        raise typer.Exit(Exit.FAILURE)


for command in (advise, profile, recipe):
    app.command()(command)
app.add_typer(data)


def _print_static_report(archs: list[str], names: list[str] | None, as_json: bool) -> None:
    if len(archs) > 1 or archs[0] not in GPUS:
        known = ", ".join(GPUS)
        raise typer.BadParameter(f"a report is of one of {known}, got {' '.join(archs)}")
    with terminal.counter("compiling") as count:
        found = roofline_report.report(names, arch=archs[0], progress=count)
    if as_json:
        print_json(roofline_report.as_json(found))
    else:
        print(roofline_report.markdown(found))


def _served_dtypes(op: Op[..., Any]) -> list[str]:
    """Those in which the smallest call does not fall back."""
    served = []
    for dtype in (*FLOATS, torch.float64):
        args, options = op.sample(op.test_shapes[0], dtype)
        if op.why_not(*args, **options) is None:
            served.append(str(dtype).removeprefix("torch."))
    return served


def _device(cuda: bool) -> str:
    if cuda:
        return torch.cuda.get_device_name()
    served = "compiled extension" if _native.native is not None else "ATen"
    return f"{environment.processor()} (CPU, {served})"


def main(arguments: Iterable[str] | None = None) -> None:
    app(None if arguments is None else list(arguments), prog_name="vlm-fast")


if __name__ == "__main__":
    main()
