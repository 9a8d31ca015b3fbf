"""Charts of a results file: time on the device by op, peak memory, and time by the host's clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from vlm_fast.benchmarks.providers import OURS
from vlm_fast.benchmarks.result_rows import Row, best_peer, by_provider, megabytes, pieces, seconds
from vlm_fast.ops.declaration import OPS

Result = dict[str, Any]
BETTER, SAME, WORSE = "#2a7ab8", "#9a9a9a", "#b8492a"
COLOURS = {"faster": BETTER, "same": SAME, "slower": WORSE}
NEAR = 0.02  # shares of memory within this of 1 are drawn as equal
# With less wall time than this per kernel launch, the host's launches decide the time.
HOST_SECONDS_PER_LAUNCH = 100e-6


@dataclass(frozen=True)
class Bar:
    """A bar of a chart: a label, a ratio to 1, the figures behind it in words, and a colour."""

    label: str
    ratio: float
    words: str
    colour: str


@dataclass(frozen=True)
class Group:
    """Bars under one heading."""

    heading: str
    bars: list[Bar]


def op_times(result: Result) -> list[Group]:
    """The fastest other provider's time over ours, for each op at its first named shape."""
    groups = {mode: Group(mode, []) for mode in ("forward", "backward")}
    firsts = {op.name: next(iter(op.bench_shapes), None) for op in OPS.values()}
    for key, found in by_provider(result.get("ops", [])).items():
        op, shape, mode = key[0], key[1], key[4]
        if mode not in groups or firsts.get(op) != shape or len(found) < 2 or OURS not in found:
            continue
        peer = found[best_peer(found)]
        ours = found[OURS]["median"]
        words = f"{seconds(ours)}; {peer['provider']} {seconds(peer['median'])}"
        bar = Bar(f"{op}: {shape}", peer["median"] / ours, words, COLOURS[peer["ours_is"]])
        groups[mode].bars.append(bar)
    return [group for group in groups.values() if group.bars]


def memory(result: Result) -> list[Group]:
    """Peak memory after the patch as a share of the peak before."""
    bars = []
    for title, before, after in pieces(result):
        if before["peak_bytes"]:
            share = after["peak_bytes"] / before["peak_bytes"]
            words = f"{megabytes(before['peak_bytes'])} → {megabytes(after['peak_bytes'])}"
            colour = BETTER if share < 1 - NEAR else WORSE if share > 1 + NEAR else SAME
            bars.append(Bar(f"{title}: {after['part']}", share, words, colour))
    return [Group("", bars)] if bars else []


def piece_times(result: Result) -> list[Group]:
    """The time before over the time after, by the host's clock; host-bound pieces apart."""
    per_launch = f"{HOST_SECONDS_PER_LAUNCH * 1e6:.0f} µs of wall time per kernel launch"
    ours = Group(f"at least {per_launch}", [])
    hosts = Group(f"host-bound: less than {per_launch}, before or after", [])
    for title, before, after in pieces(result):
        words = f"{seconds(before['median'])} → {seconds(after['median'])}"
        ratio = before["median"] / after["median"]
        bar = Bar(f"{title}: {after['part']}", ratio, words, COLOURS[after["ours_is"]])
        (hosts if is_host_bound(before, after) else ours).bars.append(bar)
    if not hosts.bars:
        return [Group("", ours.bars)] if ours.bars else []
    return [group for group in (ours, hosts) if group.bars]


def is_host_bound(before: Row, after: Row) -> bool:
    """Whether launches by the host decide the time of a piece, without or with the patch."""
    return any(
        row["launches"] and row["median"] < row["launches"] * HOST_SECONDS_PER_LAUNCH
        for row in (before, after)
    )


@dataclass(frozen=True)
class Chart:
    """A kind of chart: the function that makes its bars, its title, and the text of its axis."""

    bars: Callable[[Result], list[Group]]
    title: str
    axis: str
    logarithmic: bool


CHARTS = {
    "op_times": Chart(
        op_times, "Device time of each op, against the fastest other provider",
        "times as fast as the fastest other provider (grey: the quartiles overlap)", True,
    ),
    "memory": Chart(
        memory, "Peak memory of a call, before and after vlm_fast.patch",
        "peak memory after, as a share of the peak before", False,
    ),
    "piece_times": Chart(
        piece_times, "Time of a call in eager mode, before and after vlm_fast.patch",
        "times as fast as before, by the host's clock (grey: the quartiles overlap)", True,
    ),
}  # fmt: skip


def draw(chart: Chart, result: Result, path: Path) -> None:
    """Write a chart as SVG; its description holds the bars as JSON. See `drawn_from`."""
    import matplotlib

    matplotlib.use("Agg")
    # The same results give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "vlm_fast", "svg.fonttype": "none", "font.size": 8})
    from matplotlib import pyplot

    groups = chart.bars(result)
    sizes = [len(group.bars) + 1.5 for group in groups]
    figure, panels = pyplot.subplots(
        len(groups), 1, figsize=(11, 0.21 * sum(sizes) + 0.8), height_ratios=sizes, sharex=True,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    ratios = [bar.ratio for group in groups for bar in group.bars]
    for group, panel in zip(groups, panels[:, 0], strict=True):
        _draw_group(group, panel, chart.logarithmic)
    lowest = panels[-1, 0]
    if chart.logarithmic:
        lowest.set_xscale("log", base=2)
        lowest.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        lowest.set_xlim(min(ratios) / 1.3, max(ratios) * 6)
    else:
        lowest.set_xlim(0, max(1.2, *ratios) * 1.25)
    lowest.set_xlabel(chart.axis)
    figure.suptitle(f"{chart.title}: {result['machine']}", fontsize=9)
    data = json.dumps([asdict(group) for group in groups])
    figure.savefig(path, metadata={"Date": None, "Description": data})
    pyplot.close(figure)


def _draw_group(group: Group, panel: Any, logarithmic: bool) -> None:
    left = 1 if logarithmic else 0
    for y, bar in enumerate(group.bars):
        panel.barh(y, bar.ratio - left, 0.7, left=left, color=bar.colour)
        panel.text(
            max(bar.ratio, 1) * (1.04 if logarithmic else 1) + 0.01, y, bar.words, va="center"
        )
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_yticks(range(len(group.bars)), [bar.label for bar in group.bars])
    panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(y=0.01)
    panel.set_title(group.heading, fontsize=8, loc="left")


def drawn_from(path: Path) -> list[Group]:
    """Read the bars of a chart back from its file."""
    described = _descriptions(path)
    groups = json.loads(next(described))
    return [Group(group["heading"], [Bar(**bar) for bar in group["bars"]]) for group in groups]


def _descriptions(path: Path) -> Iterator[str]:
    for element in ElementTree.parse(path).iter("{http://purl.org/dc/elements/1.1/}description"):
        yield element.text or ""
