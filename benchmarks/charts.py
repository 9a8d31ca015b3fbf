"""Two charts of a results file: how much faster, and with what share of the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Bar = tuple[str, float, str]  # a label, a ratio, and what it is made of
FAMILIES = {
    "image_token_merge": "merge",
    "qformer": "Q-Former",
    "gated_cross_attention": "Flamingo",
    "anyres_packing": "AnyRes",
    "token_merging": "token merging",
    "patch_mergers": "patch mergers",
}
BETTER, EQUAL, WORSE = "#2a7ab8", "#9a9a9a", "#b8492a"
NEAR = 0.02  # shares of memory within this of 1 are called equal


def pairs(rows: list[Row]) -> Iterator[tuple[Row, Row]]:
    """Before and after, part by part, where both were measured."""
    before: dict[str, Row] = {row["part"]: row for row in rows if row["state"] == "before"}
    for row in rows:
        if row["state"] == "after" and row["part"] in before:
            yield before[row["part"]], row


def measured(result: dict[str, Any]) -> Iterator[tuple[str, Row, Row]]:
    """What every pair belongs to, before and after: whole models first, then the pieces."""
    for found in result.get("models", {}).values():
        for before, after in pairs(found["rows"]):
            # What was cut of the model is in the tables.
            yield found["model"].partition(" (")[0], before, after
    for family, words in FAMILIES.items():
        for before, after in pairs(result.get(family, {}).get("rows", [])):
            yield words, before, after


def speed(result: dict[str, Any]) -> list[tuple[Bar, str]]:
    """Bars of the times before over those after, and a colour each."""
    colours = {"faster": BETTER, "same": EQUAL, "slower": WORSE}
    return [
        (
            (
                f"{of}: {after['part']}",
                before["median"] / after["median"],
                f"{seconds(before['median'])} → {seconds(after['median'])}",
            ),
            colours[after["ours_is"]],
        )
        for of, before, after in measured(result)
    ]


def memory(result: dict[str, Any]) -> list[tuple[Bar, str]]:
    """Bars of the peak after as a share of the peak before, where there is one."""
    bars = []
    for of, before, after in measured(result):
        if before["peak_bytes"]:
            share = after["peak_bytes"] / before["peak_bytes"]
            words = f"{megabytes(before['peak_bytes'])} → {megabytes(after['peak_bytes'])}"
            colour = BETTER if share < 1 - NEAR else WORSE if share > 1 + NEAR else EQUAL
            bars.append(((f"{of}: {after['part']}", share, words), colour))
    return bars


def draw(
    bars: list[tuple[Bar, str]], path: Path, *, title: str, axis: str, logarithmic: bool
) -> None:
    """A bar a line; the line at 1 is what was before."""
    import matplotlib

    matplotlib.use("Agg")
    # The same results give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "vlm_fast", "svg.fonttype": "none", "font.size": 8})
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(11, 0.21 * len(bars) + 1.1), layout="constrained")
    for y, ((_, ratio, words), colour) in enumerate(bars):
        left = 1 if logarithmic else 0
        panel.barh(y, ratio - left, 0.7, left=left, color=colour)
        panel.text(max(ratio, 1) * (1.04 if logarithmic else 1) + 0.01, y, words, va="center")
    panel.axvline(1, color="black", linewidth=0.8)
    if logarithmic:
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        panel.set_xlim(None, max(ratio for (_, ratio, _), _ in bars) * 4)
    else:
        panel.set_xlim(0, max(1.2, *(ratio for (_, ratio, _), _ in bars)) * 1.25)
    panel.set_xlabel(axis)
    panel.set_yticks(range(len(bars)), [label for (label, _, _), _ in bars])
    panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(y=0.01)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


CHARTS: dict[str, tuple[Callable[[dict[str, Any]], list[tuple[Bar, str]]], str, bool]] = {
    "speed": (speed, "times as fast as before (grey: no difference that could be claimed)", True),
    "memory": (memory, "peak memory, as a share of what it was before", False),
}


def seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def megabytes(size: float) -> str:
    return f"{size / 1e6:.3g} MB"
