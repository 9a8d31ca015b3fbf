"""Charts of a profile, drawn by matplotlib: SVG for its page, and a PNG file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # a measured row of a profile
NO_MATPLOTLIB = "matplotlib is not installed: pip install 'vlm_fast[bench]'"
# Colours that can be read on a white and on a dark page.
CONNECTOR, LANGUAGE_MODEL, OTHER, TEXT = "#1f6feb", "#8fa3bf", "#8a94a3", "#7d8796"
# Text stays text, and the same chart is the same bytes.
SVG_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "vlm_fast", "text.color": TEXT, "axes.labelcolor": TEXT,
    "xtick.color": TEXT, "ytick.color": TEXT, "axes.edgecolor": TEXT, "font.size": 9,
}  # fmt: skip
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def duration(seconds: float) -> str:
    """Seconds with three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds / 1e-6)} us"


def size(count: float) -> str:
    """Bytes with three digits and a unit in powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{_digits(count / scale)} {unit}"
    return f"{count:.0f} B"


def _digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def pareto_points(rows: Sequence[Row]) -> list[Row]:
    """The Pareto points, fastest first; charts number them in this order."""
    return sorted((r for r in rows if r["on_pareto_front"]), key=lambda row: row["seconds"])


def batches_of(profile: dict[str, Any]) -> dict[int, list[Row]]:
    """The measured rows of each batch size."""
    found: dict[int, list[Row]] = {}
    for row in profile["rows"]:
        if row["times"] is not None:
            found.setdefault(row["batch"], []).append(row)
    return found


def machine(profile: dict[str, Any]) -> str:
    """Machine, threads and dtype of a profile in words."""
    where = profile["conditions"]
    several = "s" if where["threads"] > 1 else ""
    threads = f", {where['threads']} thread{several}" if where["device"] == "cpu" else ""
    return f"{where['machine']}{threads}, {where['dtype']}"


def trade_off(rows: Sequence[Row]) -> str:
    """SVG of memory over time with numbered Pareto points.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(SVG_STYLE):
        figure = Figure(figsize=(5, 4), layout="constrained")
        _draw_trade_off(figure.subplots(), rows)
        return _svg(figure, "Memory over time; Pareto points are numbered")


def shares(rows: Sequence[Row]) -> str:
    """SVG of a bar per row, fastest first: time of the connector, then of the language model.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    rows = sorted(rows, key=lambda row: row["seconds"])
    places = range(len(rows))
    connector = [row["times"]["median"] for row in rows]
    whole = [row["seconds"] for row in rows]
    with rc_context(SVG_STYLE):
        figure = Figure(figsize=(5, 0.6 + 0.32 * len(rows)), layout="constrained")
        axes = figure.subplots()
        language = [all_ - own for all_, own in zip(whole, connector, strict=True)]
        axes.barh(places, connector, color=CONNECTOR)
        bars = axes.barh(places, language, left=connector, color=LANGUAGE_MODEL)
        axes.bar_label(bars, [duration(seconds) for seconds in whole], padding=3)
        axes.set_yticks(places, [_plain(row["title"]) for row in rows])
        axes.set(xlim=(0, 1.2 * max(whole)))
        axes.xaxis.set_major_formatter(EngFormatter("s"))
        axes.invert_yaxis()
        return _svg(figure, "Time of the connector and of the language model")


def write_png(path: Path, profile: dict[str, Any]) -> str | None:
    """Write the trade-off of each batch size; returns why it was not written, or None."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return NO_MATPLOTLIB
    batches = batches_of(profile)
    if not batches:
        return "nothing was measured"
    figure = Figure(figsize=(7, 4.5 * len(batches)), layout="constrained")
    every_axes = figure.subplots(len(batches), squeeze=False).flat
    for axes, (batch, rows) in zip(every_axes, batches.items(), strict=True):
        _draw_trade_off(axes, rows)
        axes.legend(title="Pareto points", fontsize=8)
        axes.set_title(_plain(f"{profile['model']['title']}, batch {batch}, {machine(profile)}"))
    figure.savefig(path, dpi=120)
    return None


def _draw_trade_off(axes: Any, rows: Sequence[Row]) -> None:
    others = [row for row in rows if not row["on_pareto_front"]]
    axes.scatter(*_columns(others), facecolors="none", edgecolors=OTHER, s=25)
    for number, row in enumerate(pareto_points(rows), 1):
        axes.scatter(
            *_columns([row]), color=CONNECTOR, s=130, label=f"{number}  {_plain(row['title'])}"
        )
        at = (row["seconds"], row["memory_bytes"] / 1e6)
        axes.annotate(str(number), at, color="white", ha="center", va="center", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="time of connector and language model, s")
    axes.set(ylabel="memory, MB")
    axes.grid(alpha=0.3)


def _columns(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row["seconds"] for row in rows], [row["memory_bytes"] / 1e6 for row in rows]


def _plain(words: str) -> str:
    return words.replace("$", r"\$")  # a dollar sign would start a formula


def _svg(figure: Any, label: str) -> str:
    """The ``<svg>`` element of a figure, to be put into HTML."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=NO_METADATA)
    text = file.getvalue()
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
