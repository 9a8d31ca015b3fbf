"""Pictures of a profile: SVG for its page, PNG where matplotlib is installed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

ProfileRow = dict[str, Any]
WIDTH, HEIGHT = 400, 320  # about a phone's width, so that letters stay as large as set
MOST_TICKS = 5
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 44


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds / 1e-6)} us"


def size(count: float) -> str:
    """Bytes with three digits and a unit of powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{_digits(count / scale)} {unit}"
    return f"{count:.0f} B"


def _digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def trade_off(rows: Sequence[ProfileRow]) -> str:
    """Memory over time, both logarithmic; the points of the front are numbered in their order."""
    picture = _svg(WIDTH, HEIGHT, "Memory over time; points of the front are numbered")
    x = _Axis([r["seconds"] for r in rows], LEFT, WIDTH - RIGHT)
    y = _Axis([r["memory_bytes"] for r in rows], HEIGHT - BOTTOM, TOP)
    for value in x.ticks():
        _line(picture, x(value), TOP, x(value), HEIGHT - BOTTOM)
        _text(picture, x(value), HEIGHT - BOTTOM + 15, duration(value), anchor="middle")
    for value in y.ticks():
        _line(picture, LEFT, y(value), WIDTH - RIGHT, y(value))
        _text(picture, LEFT - 4, y(value) + 4, size(value), anchor="end")
    _text(
        picture,
        (LEFT + WIDTH - RIGHT) / 2,
        HEIGHT - 6,
        "time of connector and language model",
        "middle",
    )
    on_pareto_front = pareto_points(rows)
    for row in rows:
        if row not in on_pareto_front:
            _mark(picture, row, x, y, r="4", kind="point")
    for number, row in enumerate(on_pareto_front, 1):
        _mark(picture, row, x, y, r="8", kind="front")
        at = x(row["seconds"]), y(row["memory_bytes"]) + 3.5
        _text(picture, *at, str(number), anchor="middle", kind="number")
    return ElementTree.tostring(picture, encoding="unicode")


def shares(rows: Sequence[ProfileRow]) -> str:
    """A bar a point, fastest first: the connector's time, then the language model's."""
    rows = sorted(rows, key=lambda row: row["seconds"])
    step, most = 34, max(row["seconds"] for row in rows)
    picture = _svg(WIDTH, step * len(rows) + 4, "Time of the connector and of the language model")
    for i, row in enumerate(rows):
        _text(picture, 0, step * i + 13, row["title"])
        _text(picture, WIDTH, step * i + 13, duration(row["seconds"]), anchor="end")
        own = row["times"]["median"] / most * WIDTH
        whole = row["seconds"] / most * WIDTH
        for kind, start, length in (("own", 0.0, own), ("language", own, whole - own)):
            bar = {"x": start, "y": step * i + 18, "width": max(length, 0.5), "height": 9}
            SubElement(picture, "rect", {"class": kind, **_numbers(bar)})
    return ElementTree.tostring(picture, encoding="unicode")


def pareto_points(rows: Sequence[ProfileRow]) -> list[ProfileRow]:
    """The points of the front, the fastest first: the number of each is its place."""
    return sorted((r for r in rows if r["on_pareto_front"]), key=lambda row: row["seconds"])


class _Axis:
    """A logarithmic axis from the smallest value to the largest, with room at both ends."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        logs = [math.log10(max(value, 1e-12)) for value in values]
        room = max(0.06 * (max(logs) - min(logs)), 0.08)
        self.low, self.high = min(logs) - room, max(logs) + room
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = (math.log10(max(value, 1e-12)) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """At most five round numbers: powers of ten, or with 2 and 5 between them."""
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [s * 10.0**p for p in powers for s in steps]
            found = [v for v in found if self.low <= math.log10(v) <= self.high]
            if len(found) <= MOST_TICKS:
                break
        return found[:: math.ceil(len(found) / MOST_TICKS)] if found else []


def _svg(width: int, height: int, label: str) -> Element:
    box = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": label}
    return Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **box})


def _numbers(values: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.1f}" for name, value in values.items()}


def _line(picture: Element, x1: float, y1: float, x2: float, y2: float) -> None:
    SubElement(picture, "line", _numbers({"x1": x1, "y1": y1, "x2": x2, "y2": y2}))


def _text(
    picture: Element, x: float, y: float, words: str, anchor: str = "start", kind: str = "label"
) -> None:
    where = {"class": kind, "text-anchor": anchor, **_numbers({"x": x, "y": y})}
    SubElement(picture, "text", where).text = words


def _mark(picture: Element, row: ProfileRow, x: _Axis, y: _Axis, *, r: str, kind: str) -> None:
    at = _numbers({"cx": x(row["seconds"]), "cy": y(row["memory_bytes"])})
    mark = SubElement(picture, "circle", {"class": kind, "r": r, **at})
    words = f"{row['title']}: {duration(row['seconds'])}, {size(row['memory_bytes'])}"
    SubElement(mark, "title").text = words


def write_png(path: Path, profile: dict[str, Any]) -> str | None:
    """`trade_off` of each batch; returns why it was not written, or None."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "matplotlib is not installed: pip install 'vlm_fast[bench]'"
    batches = batches_of(profile)
    if not batches:
        return "nothing was measured"
    figure = Figure(figsize=(7, 4.5 * len(batches)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (batch, rows) in zip(
        figure.subplots(len(batches), squeeze=False).flat, batches.items(), strict=True
    ):
        others = [row for row in rows if not row["on_pareto_front"]]
        axes.scatter(*_columns(others), color="0.7", s=25)
        for number, row in enumerate(pareto_points(rows), 1):
            # A dollar sign would begin a formula.
            words = row["title"].replace("$", r"\$")
            axes.scatter(*_columns([row]), s=60, label=f"{number}  {words}")
            axes.annotate(str(number), (row["seconds"], row["memory_bytes"] / 1e6), (6, 4),
                          textcoords="offset points", fontsize=9)  # fmt: skip
        axes.legend(title="Pareto points", fontsize=8)
        axes.set(xscale="log", yscale="log", xlabel="connector and language model, s")
        axes.set(ylabel="weights and peak of the connector, keys and values, MB")
        axes.set_title(f"{profile['model']['title']}, batch {batch}, {machine(profile)}")
    figure.savefig(path, dpi=120)
    return None


def _columns(rows: Sequence[ProfileRow]) -> tuple[list[float], list[float]]:
    return [row["seconds"] for row in rows], [row["memory_bytes"] / 1e6 for row in rows]


def batches_of(profile: dict[str, Any]) -> dict[int, list[ProfileRow]]:
    """The measured points of each batch."""
    found: dict[int, list[ProfileRow]] = {}
    for row in profile["rows"]:
        if row["times"] is not None:
            found.setdefault(row["batch"], []).append(row)
    return found


def machine(profile: dict[str, Any]) -> str:
    where = profile["conditions"]
    several = "s" if where["threads"] > 1 else ""
    threads = f", {where['threads']} thread{several}" if where["device"] == "cpu" else ""
    return f"{where['machine']}{threads}, {where['dtype']}"
