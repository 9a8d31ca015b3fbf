"""``python -m benchmarks.picture``: the README's picture and tables, from results files alone."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import proof
from vlm_fast import evidence

Row = dict[str, Any]
README = evidence.PACKAGE.parent / "README.md"
PICTURE = evidence.RESULTS / "before_and_after.svg"
BEFORE, AFTER = "#b8b8b8", "#2a7ab8"


def main(readme: Path = README, picture: Path = PICTURE) -> None:
    results = [r for r in evidence.read_results() if llava_of(r) and not r.get("quick")]
    # A GPU before the CPUs: that is what the kernels are for.
    results.sort(key=lambda r: (r["device"] == "cpu", r["machine"]))
    text = readme.read_text()
    if results:
        draw(results[0], picture)
        link = os.path.relpath(picture, readme.parent)
        caption = f"![{title(results[0])}]({link})"
        text = between(text, "picture", f"{caption}\n\n{conditions(results[0])}")
    text = between(text, "results", "\n\n".join(tables(results)))
    readme.write_text(text)


def llava_of(result: dict[str, Any]) -> dict[str, Any]:
    """What was found of LLaVA-1.5, if anything."""
    return result.get("models", {}).get("llava", {})


def between(text: str, name: str, content: str) -> str:
    """The text with the content between two markers replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    pattern = re.compile(f"({re.escape(begin)}).*?({re.escape(end)})", re.DOTALL)
    replaced, count = pattern.subn(lambda m: f"{m[1]}\n{content}\n{m[2]}", text)
    if count != 1:
        raise ValueError(f"{begin} and {end} must stand in the text once, found {count} times")
    return replaced


def title(result: dict[str, Any]) -> str:
    return f"{llava_of(result)['model']} before and after vlm_fast.patch, {result['machine']}"


def conditions(result: dict[str, Any]) -> str:
    found, versions = llava_of(result), result["versions"]
    where = result["machine"]
    if result["device"] == "cpu":
        extension = "with" if result["compiled_extension"] else "without"
        where += f" (one thread, {extension} the compiled extension)"
    return (
        f"{found['model']}, {found['dtype']}, batch {found['batch']}, {found['sequence']} tokens "
        f"(the image: {found['photograph']}); on {where}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}, {result['date']}, commit "
        f"{short(result['commit'])}. Medians of calls in turns; quartiles in the file."
    )


def short(commit: str | None) -> str:
    """The plus sign of a tree with changes is kept."""
    return commit[:12] + commit[40:] if commit else "unknown"


# ---- tables ----


def tables(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not any(result["device"] == "cuda" for result in results):
        yield "No GPU has run this yet: there is no results file of one, so no GPU figures."
    for result in results:
        yield f"### {result['machine']}"
        yield conditions(result)
        waits = "waits on CUDA (counted, not run)" if result["device"] == "cpu" else "host waits"
        yield before_and_after(llava_of(result)["rows"], waits)
        if result.get("merge"):
            yield f"The merge alone (batch x sequence x hidden, {result['merge']['dtype']}):"
            yield before_and_after(result["merge"]["rows"], waits)
        yield f"Proof: {proof.line(llava_of(result)['proof'])}."
        if result["device"] == "cuda" and result.get("ops"):
            yield "Each op against eager PyTorch and `torch.compile` of its reference:"
            yield by_provider(result["ops"])
        if result.get("overhead"):
            yield "Python overhead of a call over plain ATen, CPU time:"
            yield overhead(result["overhead"])


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def pairs(rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """Before and after, part by part."""
    return zip(rows[::2], rows[1::2], strict=True)


def before_and_after(rows: Sequence[Row], waits: str) -> str:
    def change(before: Row, after: Row, key: str, show: Callable[[float], str]) -> str:
        return f"{show(before[key])} → {show(after[key])}"

    cells = [
        (
            after["part"],
            change(before, after, "median", milliseconds),
            f"{before['median'] / after['median']:.2f}x, {after['ours_is']}",
            change(before, after, "peak_bytes", megabytes),
            change(before, after, "saved_bytes", megabytes),
            change(before, after, "synchronisations", str),
        )
        for before, after in pairs(rows)
    ]
    columns = ("", "time", "", "peak memory", "saved for backward", waits)
    return markdown(columns, cells)


def by_provider(rows: Sequence[Row]) -> str:
    grouped: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        grouped.setdefault((row["op"], row["shape"], row["mode"]), {})[row["provider"]] = row
    cells = []
    for key, providers in grouped.items():
        ours = providers["vlm_fast"]
        others = [
            f"{microseconds(providers[p]['median'])} ({providers[p]['ours_is']})"
            if p in providers
            else ""
            for p in ("eager", "torch.compile")
        ]
        share = max(ours["of_copy"], ours["of_matmul"])
        cells.append((*key, microseconds(ours["median"]), *others, f"{share:.0%}"))
    columns = (
        "op", "shape", "pass", "ours", "eager (ours is)", "torch.compile (ours is)",
        "of a copy or matmul",
    )  # fmt: skip
    return markdown(columns, cells)


def overhead(rows: Sequence[Row]) -> str:
    cells = [(row["op"], row["mode"], f"{row['extra_us']:.0f} µs") for row in rows]
    return markdown(("op", "", "extra"), cells)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs"


def megabytes(size: float) -> str:
    return f"{size / 1e6:.3g} MB"


# ---- picture ----


def draw(result: dict[str, Any], path: Path) -> None:
    """Two panels, time and peak memory; the unpatched model is 1 in both."""
    import matplotlib

    matplotlib.use("Agg")
    # The same results give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "vlm_fast", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    merges = result["merge"]["rows"] if result.get("merge") else []
    alone = [{**row, "part": f"merge {row['part']}"} for row in merges]
    rows = list(pairs([*llava_of(result)["rows"], *alone]))
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 0.42 * len(rows) + 1.2), sharey=True)
    keys = (("median", milliseconds, "time"), ("peak_bytes", megabytes, "peak memory"))
    for panel, (key, show, name) in zip(panels, keys, strict=True):
        for y, (before, after) in enumerate(rows):
            ratio = after[key] / before[key]
            panel.barh(y - 0.18, 1, 0.34, color=BEFORE)
            panel.barh(y + 0.18, ratio, 0.34, color=AFTER)
            label = f"{show(before[key])} → {show(after[key])}"
            panel.text(max(ratio, 1) + 0.02, y, label, va="center", fontsize=8)
        panel.set_xlim(0, 1.75)
        panel.set_xticks([0, 0.5, 1])
        panel.set_xlabel(f"{name}, as a share of the unpatched model's")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [after["part"] for _, after in rows])
    panels[0].invert_yaxis()
    figure.suptitle(title(result), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
