"""The command ``vlm-fast profile``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import typer

from vlm_fast import terminal
from vlm_fast.advisor.connectors import CONNECTORS
from vlm_fast.advisor.html_report import html_page
from vlm_fast.advisor.measure_points import MeasureSettings, complete_rows, measure_all
from vlm_fast.advisor.model_shapes import MODELS
from vlm_fast.advisor.plots import duration, size, write_png
from vlm_fast.advisor.profile_points import BATCHES, MODES, TOKENS, LayerGroup, PointGroup, points
from vlm_fast.advisor.report_data import conditions, document, write_csv, write_json
from vlm_fast.cli.advisor_options import ConnectorsOption, ModelOption
from vlm_fast.cli.options import Exit, Json, enum_of, print_json, values_of
from vlm_fast.devtools import timing
from vlm_fast.ops.mlp import SAVED
from vlm_fast.signals import handled

if TYPE_CHECKING:
    Mode = str
    SavedLevels = list[str]
else:
    Mode = Literal[tuple(MODES)]
    SavedLevels = list[enum_of(SAVED)]

DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}  # by device
BUDGET, QUICK_BUDGET = 80.0, 30.0


def profile(
    model: ModelOption = "llava-1.5-7b",
    connectors: ConnectorsOption = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help=f"Visual tokens; may be repeated. {', '.join(map(str, TOKENS))} by default."
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Images at once; may be repeated. 1 and 4 by default."),
    ] = None,
    saved: Annotated[
        SavedLevels | None,
        typer.Option(help="What backward of an MLP keeps; may be repeated. All by default."),
    ] = None,
    mode: Annotated[
        Mode, typer.Option(help="What is measured: forward alone, or backward too.")
    ] = "forward",
    text: Annotated[int, typer.Option(min=1, help="Tokens of text in a prompt.")] = 64,
    budget: Annotated[
        float | None,
        typer.Option(min=1.0, help=f"Seconds for measuring; {BUDGET:.0f} by default."),
    ] = None,
    out: Annotated[Path, typer.Option(help="A folder for what is written.")] = Path(
        "vlm_fast_profile"
    ),
    trace: Annotated[
        bool, typer.Option("--trace", help="A Perfetto trace of a step of each point.")
    ] = False,
    memory_snapshot: Annotated[
        bool, typer.Option("--memory-snapshot", help="For pytorch.org/memory_viz; needs CUDA.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"Batch 1, {QUICK_BUDGET:.0f} seconds.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure connectors at several numbers of visual tokens; write a page, JSON, CSV and PNG.

    Points are measured in the order of their importance, as many as fit into the budget; others are
    listed as not measured. Ctrl-C keeps what was measured.
    """
    # Silence the log lines of the profiler that counts memory on a CPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[device]
    names = values_of(connectors) or list(CONNECTORS)
    batches = _unique(batch) or list(BATCHES[:1] if quick else BATCHES)
    levels = values_of(saved) or list(SAVED)
    shape = MODELS[model]
    wanted = _unique(tokens) or list(_default_tokens(model, names))
    try:
        groups = points(shape, names, wanted, batches, levels, mode, text, dtype)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--tokens") from None
    seconds = budget or (QUICK_BUDGET if quick else BUDGET)
    _check_writable(out)

    # On a CPU use one thread: several wait for each other and for other load.
    with timing.one_thread() if device == "cpu" else nullcontext():
        where = conditions(device, dtype, timing.ceilings(device, dtype))
        setting = MeasureSettings(
            device, dtype, where["matmul_flops_per_second"], started + seconds,
            seconds / (4 * len(groups)), out if trace else None,
        )  # fmt: skip
        with _snapshot(out if memory_snapshot else None, device):
            unfinished = _measure(groups, setting)
    complete_rows(groups, setting)
    request = {
        "mode": mode, "text": text, "tokens": wanted, "batches": batches, "levels": levels,
        "connectors": names, "budget": seconds,
    }  # fmt: skip
    found = document(model, shape, groups, request, where, started, unfinished)
    _write(out, found)
    if as_json:
        print_json(found)
    else:
        _show(found)
    if unfinished:
        raise typer.Exit(Exit.INTERRUPTED)


def _default_tokens(model: str, names: Sequence[str]) -> Iterator[int]:
    """The numbers in `TOKENS` that the model allows, and the connectors' usual ones."""
    shape = MODELS[model]
    own = [CONNECTORS[name].token_counts(shape)[:1] for name in names]
    for n in dict.fromkeys([*TOKENS, *(n for token_counts in own for n in token_counts)]):
        if any(CONNECTORS[name].why_not(shape, n) is None for name in names):
            yield n


def _unique(numbers: list[int] | None) -> list[int]:
    return list(dict.fromkeys(numbers or ()))


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = error.strerror or type(error).__name__
        message = f"{folder} cannot be written: {why}; name another"
        raise typer.BadParameter(message, param_hint="--out") from None


def _measure(groups: list[PointGroup | LayerGroup], setting: MeasureSettings) -> str | None:
    """Measure the groups; returns why it ended early, or None."""
    done = 0
    try:
        with handled(), terminal.counter("profiling") as count:
            for group in measure_all(groups, setting):
                done += 1
                count(done, len(groups))
                if not sys.stderr.isatty():
                    print(f"profile: {done} of {len(groups)}, {group.title}", file=sys.stderr)
    except KeyboardInterrupt:
        return f"interrupted after {done} of {len(groups)} groups of points"
    return None


@contextmanager
def _snapshot(folder: Path | None, device: str) -> Iterator[None]:
    if folder is not None and device == "cpu":
        print("profile: no memory snapshot: torch takes them on CUDA alone", file=sys.stderr)
        folder = None
    if folder is None:
        yield
        return
    torch.cuda.memory._record_memory_history()
    try:
        yield
    finally:
        torch.cuda.memory._dump_snapshot(str(folder / "memory_snapshot.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)


def _write(folder: Path, found: dict[str, Any]) -> None:
    write_json(folder / "profile.json", found)
    write_csv(folder / "profile.csv", found["rows"])
    (folder / "profile.html").write_text(html_page(found), encoding="utf-8")
    lack = write_png(folder / "profile.png", found)
    if lack is not None:
        print(f"profile: no profile.png: {lack}", file=sys.stderr)
    print(f"profile: written to {folder}", file=sys.stderr)


def _show(found: dict[str, Any]) -> None:
    rows = []
    for row in found["rows"]:
        cells = [
            "*" if row["on_pareto_front"] else "",
            row["title"],
            row["batch"],
            row["visual_tokens"],
        ]
        if row["times"] is None:
            cells += ["", "", "", "", f"not measured: {row['not_measured']}"]
        else:
            share = row["language"]
            cells += [
                duration(row["times"]["median"]), f"{duration(share['seconds'])} {share['basis']}",
                duration(row["seconds"]), size(row["memory_bytes"]), "",
            ]  # fmt: skip
        rows.append(cells)
    where = found["conditions"]
    title = f"{found['model']['title']}, {found['request']['mode']}, {where['dtype']}, on "
    columns = (
        "front", "point", "batch", "tokens in sequence", "connector", "language model", "in all",
        "memory", "",
    )  # fmt: skip
    terminal.show(title + where["machine"], columns, rows)
