"""``python -m vlm_fast.benchmarks.report``: charts and tables in README and docs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_fast.benchmarks import picture
from vlm_fast.benchmarks.models import proof
from vlm_fast.benchmarks.picture import FAMILIES, megabytes, pairs, seconds
from vlm_fast.benchmarks.providers import EAGER, OURS
from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import results_files

Row = dict[str, Any]
ROOT = results_files.PACKAGE.parent
README, MEASURED, CHARTS = ROOT / "README.md", ROOT / "docs" / "measured.md", results_files.RESULTS
MORE_BYTES = 1.02  # above this share of what it was, memory is a loss
FEW_BYTES = 100_000  # what is no more than that, is none


def main(readme: Path = README, measured: Path = MEASURED, charts: Path = CHARTS) -> None:
    results = [r for r in results_files.read_results() if not r.get("quick") and r.get("models")]
    # A GPU before the CPUs: that is what the kernels are for.
    results.sort(key=lambda r: (r["device"] == "cpu", r["machine"]))
    text = readme.read_text()
    if results:
        text = between(text, "charts", "\n\n".join(drawn(results[0], charts, readme)))
    text = between(text, "results", "\n\n".join(summary(results)))
    readme.write_text(text)
    measured.write_text(between(measured.read_text(), "measured", "\n\n".join(whole(results))))


def between(text: str, name: str, content: str) -> str:
    """The text with the content between two markers replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    pattern = re.compile(f"({re.escape(begin)}).*?({re.escape(end)})", re.DOTALL)
    replaced, count = pattern.subn(lambda m: f"{m[1]}\n{content}\n{m[2]}", text)
    if count != 1:
        raise ValueError(f"{begin} and {end} must stand in the text once, found {count} times")
    return replaced


# ---- charts ----


def drawn(result: dict[str, Any], folder: Path, readme: Path) -> Iterator[str]:
    """Draw each chart beside the results, and link it; then under which conditions."""
    for name, (bars, axis, logarithmic) in picture.CHARTS.items():
        path = folder / f"{name}.svg"
        title = f"Before and after vlm_fast.patch, {result['machine']}: {name}"
        picture.draw(bars(result), path, title=title, axis=axis, logarithmic=logarithmic)
        yield f"![{title}]({os.path.relpath(path, readme.parent)})"
    yield conditions(result)


def conditions(result: dict[str, Any]) -> str:
    versions, where = result["versions"], result["machine"]
    if result["device"] == "cpu":
        extension = "with" if result["compiled_extension"] else "without"
        where += f" (one thread, {extension} the compiled extension)"
    found = next(iter(result["models"].values()))
    return (
        f"Random weights, {found['dtype']}, {found['photograph']}; on {where}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}, {result['date']}, commit "
        f"{short(result['commit'])}. Medians of calls in turns; quartiles in the file."
    )


def short(commit: str | None) -> str:
    """The plus sign of a tree with changes is kept."""
    return commit[:12] + commit[40:] if commit else "unknown"


# ---- tables ----


def summary(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """For the README: whole models, and every loss among them and their pieces."""
    yield from no_gpu(results)
    for result in results:
        yield f"### {result['machine']}"
        yield from models(result)
        yield "#### Losses"
        yield losses({**result, "ops": []})
        yield "Losses of single ops are in [measured](docs/measured.md)."


def whole(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """For the page of measurements: everything that the files hold."""
    yield from no_gpu(results)
    for result in results:
        yield f"## {result['machine']}"
        yield conditions(result)
        yield from models(result)
        for family, words in FAMILIES.items():
            if result.get(family, {}).get("rows"):
                yield f"### {words[0].upper()}{words[1:]}, {result[family]['dtype']}"
                yield before_and_after(result[family]["rows"], waits_of(result))
        if result.get("ops"):
            yield "### Ops"
            yield (
                "Ours, then every other provider that ran: its time and what ours is beside it. "
                "The share is of the floor: a copy or a matmul measured in the same run."
            )
            yield by_provider(result["ops"])
        if result.get("overhead"):
            yield "### Python overhead of a call over plain ATen, CPU time"
            yield overhead(result["overhead"])
        yield "### Losses"
        yield losses(result)


def no_gpu(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not any(result["device"] == "cuda" for result in results):
        yield "No GPU has run this yet: there is no results file of one, so no GPU figures."


def waits_of(result: dict[str, Any]) -> str:
    return "waits on CUDA (counted, not run)" if result["device"] == "cpu" else "host waits"


def models(result: dict[str, Any]) -> Iterator[str]:
    for found in result["models"].values():
        yield (
            f"**{found['model']}**, {found['dtype']}, batch {found['batch']}, "
            f"{found['sequence']} tokens. Proof: {proof.line(found['proof'])}."
        )
        yield before_and_after(found["rows"], waits_of(result))


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def before_and_after(rows: list[Row], waits: str) -> str:
    def change(before: Row, after: Row, key: str, show: Callable[[float], str]) -> str:
        if before[key] is None or after[key] is None:
            return ""
        return f"{show(before[key])} → {show(after[key])}"

    cells = [
        (
            after["part"],
            change(before, after, "median", seconds),
            f"{before['median'] / after['median']:.2f}x, {after['ours_is']}",
            change(before, after, "peak_bytes", megabytes),
            change(before, after, "saved_bytes", megabytes),
            change(before, after, "synchronisations", str),
        )
        for before, after in pairs(rows)
    ]
    return markdown(("", "time", "", "peak memory", "saved for backward", waits), cells)


def by_provider(rows: Sequence[Row]) -> str:
    grouped: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if row["status"] == "measured" and row["op"] in OPS:  # results outlive deleted ops
            grouped.setdefault((row["op"], row["shape"], row["mode"]), {})[row["provider"]] = row
    cells = []
    for key, providers in grouped.items():
        ours = providers.pop(OURS, None)
        if ours is None:
            continue
        others = "; ".join(
            f"{name} {seconds(row['median'])} ({row['ours_is']})" for name, row in providers.items()
        )
        cells.append((*key, seconds(ours["median"]), f"{ours['of_floor']:.0%}", others))
    return markdown(("op", "shape", "pass", "ours", "of the floor", "others (ours is)"), cells)


def losses(result: dict[str, Any]) -> str:
    """Where ours is slower than eager PyTorch, or takes more memory; other providers of an op are
    in the table of ops."""
    cells: list[tuple[str, str, str]] = []
    for of, before, after in picture.measured(result):
        if after["ours_is"] == "slower":
            ratio = after["median"] / before["median"]
            cells.append((of, after["part"], f"takes {ratio:.2f} times as long"))
        for key, words in (("peak_bytes", "peak memory"), ("saved_bytes", "saved bytes")):
            if not before[key] or not after[key] or after[key] - before[key] <= FEW_BYTES:
                continue
            if after[key] > MORE_BYTES * before[key]:
                cells.append((of, after["part"], f"{after[key] / before[key]:.2f} of the {words}"))
    for row in result.get("ops", []):
        if (
            row["status"] == "measured" and row["op"] in OPS and row["provider"] == EAGER
            and row["ours_is"] == "slower"
        ):  # fmt: skip
            words = f"takes {1 / row['times_faster']:.2f} times as long as eager"
            cells.append((row["op"], f"{row['shape']}, {row['mode']}", words))
    return markdown(("", "", "ours"), cells) if cells else "None was measured."


def overhead(rows: Sequence[Row]) -> str:
    cells = [(row["op"], row["mode"], f"{row['extra_us']:.0f} µs") for row in rows]
    return markdown(("op", "", "extra"), cells)


if __name__ == "__main__":
    main()
