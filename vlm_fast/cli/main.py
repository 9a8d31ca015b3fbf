"""The command ``vlm-fast``. Exit codes: 0 success, 1 failure, 2 usage, 3 environment."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from vlm_fast import terminal
from vlm_fast.cli.advise import advise
from vlm_fast.cli.compile import compile_
from vlm_fast.cli.data import data
from vlm_fast.cli.options import (
    Exit,
    Json,
    OpArgument,
    OpsOption,
    print_json,
    stop,
    values_of,
)
from vlm_fast.cli.profile import profile
from vlm_fast.cli.recipe import recipe
from vlm_fast.devtools import environment
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
    """Show versions and GPUs, what is missing, why, and what to do about it."""
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
    """List the ops, and on which machines each was verified."""
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
def check(
    op: OpArgument = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="All shapes of every op; takes some minutes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every op on this machine against its reference, forward and backward.

    Every op is run in float32, bfloat16 and float16, at three shapes, in less than 45 seconds on a
    CPU. With --thorough it is run at all its test shapes and at the shapes of real checkpoints.
    """
    start = time.perf_counter()
    names = [op] if op else list(OPS)
    cuda = torch.cuda.is_available()
    if cuda and not _triton.AVAILABLE:
        stop(Exit.ENVIRONMENT, "Triton is not installed, so the GPU has no kernels to check")
    total = self_test.count(names, device="cuda" if cuda else "cpu", thorough=thorough)
    cases = []
    with terminal.counter("checking") as count:
        for case in self_test.run(names, thorough=thorough):
            cases.append(case)
            count(len(cases), total)
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
        title = f"ops against their references on {_device(cuda)}"
        terminal.show(title, ("op", "cases", "dtypes", "largest error / budget", ""), rows)
        for line in failures:
            print(line)
        print(f"{len(cases)} cases, {len(failures)} failures, {time.perf_counter() - start:.1f} s")
    if failures or not cases:
        raise typer.Exit(Exit.FAILURE)


@app.command()
def bench(
    full: Annotated[
        bool, typer.Option("--full", help="Every section; the better part of an hour on a CPU.")
    ] = False,
    section: Annotated[
        list[str] | None, typer.Option(help="parity, ops, models, ... or all; may be repeated.")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="With --section or --op: small sizes and few repeats.")
    ] = False,
    op: OpsOption = None,
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
        Path | None, typer.Option("--csv", help="Write the rows of the ops here.")
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
    """Time ops and models against plain PyTorch, torch.compile and other libraries.

    Without options it takes about two minutes: it patches, verifies and times a small LLaVA on a
    photograph, and times some ops. With --full it runs every section. With --section, --op and the
    options after it, it runs those; the default section is then "ops".

    Exit codes: 1 also where something is slower than before, 130 after an interruption; the file
    then holds the results so far.
    """
    code = importlib.import_module("vlm_fast.benchmarks.cli").main(
        full=full, sections=section or [], op=values_of(op), shape=shape or [], mode=mode or [],
        provider=provider or [], dtype=dtype, quick=quick, json_file=json_file, csv_file=csv_file,
        save=save, against=against, allowed=allowed,
    )  # fmt: skip
    if code:
        raise typer.Exit(code)


for command in (advise, profile, recipe):
    app.command()(command)
app.command(name="compile")(compile_)
app.add_typer(data)


def _served_dtypes(op: Op[..., Any]) -> list[str]:
    """The dtypes in which the smallest call does not fall back."""
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
