"""Measure the points of a profile, as many as the time allows."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from vlm_fast.advisor.connector_modules import ConnectorModule
from vlm_fast.advisor.connectors import CONNECTORS
from vlm_fast.advisor.language_model import LanguageLayer
from vlm_fast.advisor.pareto import pareto_front
from vlm_fast.advisor.profile_points import LayerGroup, PointGroup, ProfileRow, timed_flops
from vlm_fast.devtools import memory, timing
from vlm_fast.devtools.timing import Times

ROUNDS = (3, 60)
RUNS = ROUNDS[0] + 2  # calls of each module: a warm-up, the fewest rounds, and one for its memory
SLACK = 1.5  # measured time relative to the rate of a large matrix product, as an estimate


@dataclass(frozen=True)
class MeasureSettings:
    """How to measure.

    Attributes:
        device: "cpu" or "cuda".
        dtype: of everything.
        flops_per_second: measured rate of a large matrix product.
        deadline: a value of ``time.monotonic``; a group that would take longer is not started.
        seconds: time for each group; the fewest rounds may take longer.
        traces: folder for a trace of one step of each connector, or None.
    """

    device: str
    dtype: torch.dtype
    flops_per_second: float
    deadline: float
    seconds: float
    traces: Path | None = None


def measure_all(
    groups: Sequence[PointGroup | LayerGroup], setting: MeasureSettings
) -> Iterator[PointGroup | LayerGroup]:
    """Measure groups in order and fill in their rows; yield each group when it is finished.

    Rows that cannot be measured get the reason: out of time, or the error.
    """
    for group in groups:
        left = setting.deadline - time.monotonic()
        seconds = SLACK * RUNS * timed_flops(group) / setting.flops_per_second
        why = None
        if seconds > left:
            why = f"out of time: about {seconds:.0f} s, {max(0.0, left):.0f} s left"
        else:
            try:
                if isinstance(group, LayerGroup):
                    _measure_layer(group, setting)
                else:
                    _measure(group, setting)
            except RuntimeError as error:  # such as out of memory
                why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if isinstance(group, PointGroup):
            for row in group.rows:
                row.not_measured = None if row.times is not None else why
        yield group


def complete_rows(groups: Sequence[PointGroup | LayerGroup], setting: MeasureSettings) -> None:
    """Compute totals of each row, and mark the Pareto points of each batch size."""
    rows = [row for group in groups if isinstance(group, PointGroup) for row in group.rows]
    timed = {}
    for row in rows:
        share = row.language
        share.modelled_seconds = share.seconds = share.flops / setting.flops_per_second
        if share.layer is not None and share.flops:
            whole = row.point.model.language.layers * share.layer.median
            timed[share.flops] = whole / share.flops
    for row in rows:
        share = row.language
        if timed and share.flops:
            nearest = min(timed, key=lambda flops: abs(math.log(flops / share.flops)))
            share.seconds = share.flops * timed[nearest]
            share.basis = "extrapolated" if share.layer is None else "measured"
        if row.times is not None and row.peak_bytes is not None:
            row.seconds = row.times.median + share.seconds
            weights = row.parameters * setting.dtype.itemsize
            row.memory_bytes = weights + row.peak_bytes + row.key_value_bytes
    for batch in {row.point.prompts for row in rows}:
        ready = [row for row in rows if row.point.prompts == batch]
        aims = [
            (row, (row.seconds, row.memory_bytes, -row.point.tokens))
            for row in ready
            if row.seconds is not None and row.memory_bytes is not None
        ]
        for i in pareto_front([aim for _, aim in aims]):
            aims[i][0].on_pareto_front = True


@dataclass
class _Call:
    """A module with its arguments.

    Attributes:
        step: one forward, in training also backward.
        forward: one forward with gradients enabled.
        known: parameters and arguments, which do not count as saved memory.
        count: number of such modules in the model.
    """

    step: Callable[[], Any]
    forward: Callable[[], Any]
    known: list[Tensor]
    count: int


def _measure(group: PointGroup, setting: MeasureSettings) -> None:
    torch.manual_seed(0)
    training = group.rows[0].mode == "training"
    calls = {
        (r, p): _call(piece, setting, training)
        for r, row in enumerate(group.rows)
        for p, piece in enumerate(CONNECTORS[row.point.connector].make_modules(row.point))
    }
    found = _interleaved(calls, setting)
    for r, row in enumerate(group.rows):
        own = [(calls[name], times) for name, times in found.items() if name[0] == r]
        _fill(row, own, setting.device)
        if setting.traces is not None:
            _trace(row, [call for call, _ in own], setting)


def _measure_layer(group: LayerGroup, setting: MeasureSettings) -> None:
    row = group.rows[0]
    training, language = row.mode == "training", row.point.model.language

    def layer() -> nn.Module:
        return LanguageLayer(language).requires_grad_(False)

    def x() -> tuple[Tensor, ...]:
        size = (row.point.prompts, row.language.tokens, language.hidden)
        return (torch.randn(size, requires_grad=training),)

    call = _call(ConnectorModule(layer, x), setting, training)
    (times,) = _interleaved({"layer": call}, setting).values()
    for row in group.rows:
        row.language.layer = times


def _interleaved(calls: dict[Any, _Call], setting: MeasureSettings) -> dict[Any, Times]:
    return timing.interleaved(
        {name: call.step for name, call in calls.items()}, [()], device=setting.device,
        seconds=setting.seconds, rounds=ROUNDS, wall=True,
    )  # fmt: skip


def _call(piece: ConnectorModule, setting: MeasureSettings, training: bool) -> _Call:
    before = torch.get_default_dtype()
    torch.set_default_dtype(setting.dtype)
    try:
        with torch.device(setting.device):
            module, args = piece.make(), piece.inputs()
            with torch.no_grad():
                upstream = torch.randn_like(module(*args)) if training else None
    finally:
        torch.set_default_dtype(before)
    parameters = [p for p in module.parameters() if p.requires_grad]
    wanted = [*parameters, *(a for a in args if a.requires_grad)]

    def forward() -> Any:
        return module(*args)

    def training_step() -> Any:
        return torch.autograd.grad(module(*args), wanted, upstream)

    step = training_step if training else torch.no_grad()(forward)
    return _Call(step, forward, [*module.parameters(), *args], piece.count)


def _fill(row: ProfileRow, own: list[tuple[_Call, Times]], device: str) -> None:
    """Fill in a row: times add up over modules; the peak is the largest one plus what all keep."""
    row.times = Times(
        sum(call.count * t.median for call, t in own),
        sum(call.count * t.lower for call, t in own),
        sum(call.count * t.upper for call, t in own),
        min(t.rounds for _, t in own),
    )
    peaks = [memory.peak_bytes(call.step, device) for call, _ in own]
    saved = [0] * len(own)
    if row.mode == "training":
        saved = [memory.saved_bytes(call.forward, call.known) for call, _ in own]
    kept = sum(call.count * s for (call, _), s in zip(own, saved, strict=True))
    row.saved_bytes = kept
    row.peak_bytes = kept + max(peak - s for peak, s in zip(peaks, saved, strict=True))
    row.not_measured = None


def _trace(row: ProfileRow, calls: list[_Call], setting: MeasureSettings) -> None:
    """Write a trace of one step of each module, for chrome://tracing or ui.perfetto.dev."""
    assert setting.traces is not None
    words = f"{row.point.connector} {row.title.partition(', ')[2]} batch {row.point.prompts}"
    path = setting.traces / f"trace_{re.sub(r'[^0-9A-Za-z]+', '_', words)}.json"
    activities = [ProfilerActivity.CPU]
    if setting.device != "cpu":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as record:
        for i, call in enumerate(calls):
            with record_function(f"vlm_fast::{row.point.connector}[{i}]"):
                call.step()
        timing.wait(setting.device)
    record.export_chrome_trace(str(path))
