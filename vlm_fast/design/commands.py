"""``vlm-fast advise`` and ``vlm-fast profile``."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any

import torch
import typer

from vlm_fast import tables
from vlm_fast.design.advice import SCENARIOS, Option
from vlm_fast.design.advice import advise as advice_for
from vlm_fast.design.connectors import CONNECTORS
from vlm_fast.design.grid import BATCHES, MODES, TOKENS, Group, Layer, points
from vlm_fast.design.page import page
from vlm_fast.design.pictures import duration, size, write_png
from vlm_fast.design.record import conditions, document, write_csv, write_json
from vlm_fast.design.shapes import MODELS
from vlm_fast.design.sweep import Setting, finish, sweep
from vlm_fast.measure import timing
from vlm_fast.ops.mlp import SAVED

UNITS = {"": 1, "b": 1} | {
    f"{letter}{i}b": base**power
    for power, letter in enumerate("kmgt", 1)
    for i, base in (("", 1000), ("i", 1024))
}


def known(what: str, names: Iterable[str]) -> Any:
    """A callback that lets a known name pass, or nothing."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(f"no {what} is called {value!r}; there are {', '.join(names)}")
        return value

    return check


def in_bytes(text: str | None) -> int | None:
    """A size such as 24GB (of 1000) or 24GiB (of 1024) in bytes."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in UNITS or float(found[1]) == 0:
        raise typer.BadParameter(f"{text!r} is no size; write it like 24GB or 24GiB")
    return int(float(found[1]) * UNITS[found[2]])


def listed(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def connectors_of(text: str | None) -> list[str] | None:
    """Names of connectors, by commas."""
    names = listed(text)
    if names is not None and not names:
        raise typer.BadParameter(f"none is named; there are {', '.join(CONNECTORS)}")
    for name in names or []:
        known("connector", CONNECTORS)(name)
    return names


ModelOption = Annotated[
    str, typer.Option(callback=known("model", MODELS), help=f"One of {', '.join(MODELS)}.")
]
ConnectorsOption = Annotated[
    str | None,
    typer.Option("--connectors", help=f"By commas, of {', '.join(CONNECTORS)}; all by default."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def advise(
    scenario: Annotated[
        str,
        typer.Option(callback=known("scenario", SCENARIOS), help=f"One of {', '.join(SCENARIOS)}."),
    ] = "documents",
    model: ModelOption = "llava-1.5-7b",
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the sequence; the model's own by default.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="For weights, keys and values: 24GB, 24GiB; no limit if not.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="In a prompt.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="At once.")] = None,
    text: Annotated[
        int, typer.Option(min=1, help="Tokens of text a request needs, with its answer.")
    ] = 256,
    connectors: ConnectorsOption = None,
    as_json: Json = False,
) -> None:
    """Which connector, how many visual tokens: ranked for a use, with figures and reasons."""
    found = advice_for(
        scenario, model, context=context, memory=_option("--memory", in_bytes, memory),
        images=images, requests=requests, text=text,
        connectors=_option("--connectors", connectors_of, connectors),
    )  # fmt: skip
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
        return
    limit = "no limit of memory" if found.memory is None else f"{found.memory / 1e9:.1f} GB"
    title = (
        f"{found.model}, {SCENARIOS[scenario].title}: {found.context} tokens of context, "
        f"{found.images} image(s) a prompt, {found.requests} request(s), {found.text} tokens of "
        f"text, {limit}, {found.dtype}"
    )
    tables.show(title, COLUMNS, [_cells(i, o) for i, o in enumerate(found.options, 1)])
    print(f"Order: {found.rule}.")
    print("FLOPs and bytes are those of the cost models, nothing was run; KV: keys and values.")
    for number, option in enumerate(found.options, 1):
        print(f"\n{number}. {option.title}, {_tokens(option)}")
        if option.infeasible:
            print(f"   cannot be had: {option.infeasible}")
        for mark, lines in (("+", option.reasons_for), ("-", option.reasons_against)):
            for line in lines:
                print(f"   {mark} {line}")
        for measurement in option.measured:
            print(f"   = {measurement}")


COLUMNS = (
    "", "connector", "visual tokens", "text left", "compression", "parameters", "KV a request",
    "memory", "requests fit", "connector forward", "backward keeps", "prefill", "measured",
)  # fmt: skip


def _cells(number: int, o: Option) -> tuple[object, ...]:
    measured = o.measured[0] if o.measured else None
    return (
        "-" if o.infeasible else number,
        o.title + (" *" if o.own else ""),
        _tokens(o),
        max(0, o.text_tokens_left),
        f"{o.compression:.3g}x",
        f"{o.parameters / 1e6:.1f} M",
        f"{o.key_value_bytes / 1e6:.0f} MB",
        f"{o.memory_bytes / 1e9:.1f} GB",
        "" if o.most_requests is None else o.most_requests,
        f"{o.cost.forward_flops / 1e9:.1f} GFLOP, {o.cost.forward_bytes / 1e6:.0f} MB",
        f"{min(o.saved_bytes.values()) / 1e6:.1f} MB",
        f"{o.prefill_flops / 1e12:.2f} TFLOP, {o.prefill_bytes / 1e9:.1f} GB",
        "" if measured is None else f"{measured.seconds * 1e3:.3g} ms ({measured.dtype})",
    )


def _tokens(option: Option) -> str:
    beside = "" if option.visual_tokens else f" ({option.seen_tokens} beside the sequence)"
    return f"{option.visual_tokens}{beside}"


def _option(name: str, convert: Any, value: Any) -> Any:
    try:
        return convert(value)
    except typer.BadParameter as error:
        error.param_hint = name
        raise


# ---- profile ----

DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
BUDGET, QUICK_BUDGET = 80.0, 20.0
INTERRUPTED = 130  # as a shell has it


def numbers(text: str | None) -> list[int] | None:
    """Positive whole numbers, by commas."""
    words = listed(text)
    if words is None:
        return None
    if not words or not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise typer.BadParameter(f"{text!r}: expected whole numbers from 1, by commas: 576,64")
    return list(dict.fromkeys(map(int, words)))


def levels_of(text: str | None) -> list[str] | None:
    """Levels of ``saved``, by commas."""
    words = listed(text)
    if words is not None and not words:
        raise typer.BadParameter(f"none is named; there are {', '.join(SAVED)}")
    for word in words or []:
        known("level", SAVED)(word)
    return words


def profile(
    model: ModelOption = "llava-1.5-7b",
    connectors: ConnectorsOption = None,
    tokens: Annotated[
        str | None,
        typer.Option(help=f"Visual tokens, by commas; {','.join(map(str, TOKENS))} by default."),
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Images at once, by commas; 1,4 by default.")
    ] = None,
    saved: Annotated[
        str | None, typer.Option(help=f"What backward keeps, by commas, of {', '.join(SAVED)}.")
    ] = None,
    mode: Annotated[
        str, typer.Option(callback=known("mode", MODES), help=f"One of {', '.join(MODES)}.")
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

    Points are measured in the order of their worth, as many as fit into the budget; those that do
    not are listed as not measured. Ctrl-C keeps what was measured.
    """
    # The profiler that counts memory on a CPU would tell of its every start.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[device]
    names = _option("--connectors", connectors_of, connectors) or list(CONNECTORS)
    wanted = _option("--tokens", numbers, tokens)
    batches = _option("--batch", numbers, batch) or list(BATCHES[:1] if quick else BATCHES)
    levels = _option("--saved", levels_of, saved) or list(SAVED)
    shape = MODELS[model]
    if wanted is None:
        wanted = list(_default_tokens(model, names))
    try:
        groups = points(shape, names, wanted, batches, levels, mode, text, dtype)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--tokens") from None
    seconds = budget or (QUICK_BUDGET if quick else BUDGET)
    _option("--out", _writable, out)

    # On a CPU threads wait for each other, and for whatever else runs.
    with timing.one_thread() if device == "cpu" else nullcontext():
        where = conditions(device, dtype, timing.ceilings(device, dtype))
        setting = Setting(
            device, dtype, where["matmul_flops_per_second"], started + seconds,
            seconds / (4 * len(groups)), out if trace else None,
        )  # fmt: skip
        with _snapshot(out if memory_snapshot else None, device):
            unfinished = _measure(groups, setting)
    finish(groups, setting)
    asked = {
        "mode": mode, "text": text, "tokens": wanted, "batches": batches, "levels": levels,
        "connectors": names, "budget": seconds,
    }  # fmt: skip
    found = document(model, shape, groups, asked, where, started, unfinished)
    _write(out, found)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _show(found)
    if unfinished:
        raise typer.Exit(INTERRUPTED)


def _default_tokens(model: str, names: Sequence[str]) -> Iterator[int]:
    """Those of `TOKENS` that the model can be given, and the connectors' own."""
    shape = MODELS[model]
    own = [CONNECTORS[name].counts(shape)[:1] for name in names]
    for n in dict.fromkeys([*TOKENS, *(n for counts in own for n in counts)]):
        if any(CONNECTORS[name].why_not(shape, n) is None for name in names):
            yield n


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise typer.BadParameter(f"{folder} cannot be written: {why}; name another") from None


def _measure(groups: list[Group | Layer], setting: Setting) -> str | None:
    """Why it ended early, or None."""
    done = 0
    try:
        with tables.counter("profiling") as count:
            for group in sweep(groups, setting):
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
    (folder / "profile.html").write_text(page(found), encoding="utf-8")
    lack = write_png(folder / "profile.png", found)
    if lack is not None:
        print(f"profile: no profile.png: {lack}", file=sys.stderr)
    print(f"profile: written to {folder}", file=sys.stderr)


def _show(found: dict[str, Any]) -> None:
    rows = []
    for row in found["rows"]:
        cells = ["*" if row["on_front"] else "", row["title"], row["batch"], row["visual_tokens"]]
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
    title = f"{found['model']['title']}, {found['asked']['mode']}, {where['dtype']}, on "
    columns = (
        "front", "point", "batch", "tokens in sequence", "connector", "language model", "in all",
        "memory", "",
    )  # fmt: skip
    tables.show(title + where["machine"], columns, rows)
