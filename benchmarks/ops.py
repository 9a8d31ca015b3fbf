"""Time every op at its named shapes, in each pass, by every provider that can compute it here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlm_fast import terminal
from vlm_fast.benchmarks import machine, providers
from vlm_fast.benchmarks.providers import COMPILED, OURS, Unavailable
from vlm_fast.devtools import memory, timing
from vlm_fast.devtools.launches import launches
from vlm_fast.devtools.passes import CALLS, MODES, with_upstream
from vlm_fast.devtools.telemetry import Telemetry
from vlm_fast.devtools.timing import Ceilings, Times
from vlm_fast.ops.declaration import OPS, Op
from vlm_fast.verification.self_test import one_sample, shrink

Row = dict[str, Any]
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
INPUTS = 2  # sets of random inputs, used in rotation
COMPILING = 5.0  # seconds that the first compilation is expected to take


@dataclass(frozen=True)
class Selection:
    """What to measure; None selects everything."""

    ops: Sequence[str] | None = None
    shapes: Sequence[str] | None = None
    modes: Sequence[str] | None = None
    providers: Sequence[str] | None = None
    dtype: torch.dtype | None = None

    def has(self, kind: str, name: str) -> bool:
        wanted = getattr(self, kind)
        return wanted is None or name in wanted


@dataclass
class Pace:
    """Decides whether torch.compile still fits into the time of a run.

    Attributes:
        steps: cases in the run; each has an equal share of the time.
        start, end: of ``time.monotonic``.
        compiled: functions compiled so far.
        seconds: that they took together.
    """

    steps: int
    start: float
    end: float
    compiled: int = 0
    seconds: float = 0.0

    @classmethod
    def until(cls, deadline: float | None, steps: int) -> Pace:
        return cls(max(steps, 1), time.monotonic(), float("inf") if deadline is None else deadline)

    def allows_compiling(self, step: int) -> bool:
        """Whether one more compilation ends within the share of this step."""
        if self.end == float("inf"):
            return True
        share_ends = self.start + (step + 1) / self.steps * (self.end - self.start)
        expected = self.seconds / self.compiled if self.compiled else COMPILING
        return time.monotonic() + expected <= share_ends

    def compiling_took(self, seconds: float) -> None:
        self.compiled += 1
        self.seconds += seconds


def shapes_of(
    op: Op[..., Any], device: str, *, quick: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The named shapes; on a CPU one sample of each; with ``quick`` the first one, made smaller."""
    for label, shape in op.bench_shapes.items():
        if quick:
            yield label, shrink(one_sample(shape))
            return
        yield label, one_sample(shape) if device == "cpu" else dict(shape)


def scale(device: str, *, quick: bool) -> str:
    """How the named shapes were changed, in words."""
    if quick:
        return "one sample, sizes / 8"
    return "one sample" if device == "cpu" else "whole"


def measure(
    selection: Selection,
    *,
    device: str,
    quick: bool = False,
    seconds: float | None = None,
    deadline: float | None = None,
    thorough: bool = True,
) -> Iterator[tuple[Row, list[float]]]:
    """Yield a row for each op, shape, pass and provider, with the seconds of each call.

    Args:
        selection: of ops, shapes, passes, providers and dtype.
        device: "cpu" or "cuda".
        quick: small sizes and few repeats.
        seconds: for which the providers of one pass take turns, about.
        deadline: of ``time.monotonic``. When the run falls behind, torch.compile is left out, and
            its rows say so.
        thorough: False uses torch.compile, and counts launches, at the first shape of an op only.
    """
    seconds = seconds or (0.1 if quick else 2.0)
    best = timing.ceilings(device, selection.dtype or DTYPE[device])
    cases = [
        (op, label, shape)
        for op in OPS.values()
        if selection.has("ops", op.name)
        for label, shape in shapes_of(op, device, quick=quick)
        if selection.has("shapes", label)
    ]
    pace = Pace.until(deadline, len(cases))
    before = None
    for step, (op, label, shape) in enumerate(cases):
        case = Case(op, label, shape, selection, device, quick, seconds, best)
        yield from case.rows(pace, step, thorough=thorough or op is not before)
        before = op


@dataclass(frozen=True)
class Case:
    """One op at one shape."""

    op: Op[..., Any]
    label: str
    shape: Mapping[str, Any]
    selection: Selection
    device: str
    quick: bool
    seconds: float
    best: Ceilings

    def rows(self, pace: Pace, step: int, *, thorough: bool) -> Iterator[tuple[Row, list[float]]]:
        dtype = self.selection.dtype or DTYPE[self.device]
        torch.manual_seed(0)
        samples = [self.op.sample(self.shape, dtype, self.device) for _ in range(INPUTS)]
        options = samples[0][1]
        found = providers.of(self.op, *samples[0], self.device)
        found = {name: f for name, f in found.items() if self.selection.has("providers", name)}
        if not thorough:
            late: Any = Unavailable("this run compiles an op at its first shape only")
            found |= {name: late for name in COMPILED if name in found}
        for mode in MODES:
            if self.selection.has("modes", mode):
                if mode != "forward" and self.op.returns_indices:
                    continue
                inputs = [self._inputs(args, options, mode) for args, _ in samples]
                yield from self._mode(mode, found, inputs, options, dtype, pace, step, thorough)

    def _inputs(self, args: tuple[Any, ...], options: Mapping[str, Any], mode: str) -> Any:
        return args if mode == "forward" else with_upstream(self.op, args, options)

    def _mode(
        self,
        mode: str,
        found: providers.Providers,
        inputs: list[tuple[Any, ...]],
        options: Mapping[str, Any],
        dtype: torch.dtype,
        pace: Pace,
        step: int,
        thorough: bool,
    ) -> Iterator[tuple[Row, list[float]]]:
        head = {
            "op": self.op.name,
            "shape": self.label,
            "scale": scale(self.device, quick=self.quick),
            "dtype": str(dtype).removeprefix("torch."),
            "mode": mode,
        }
        # After another shape, Dynamo would compile for dynamic shapes, or reuse what it compiled.
        torch._dynamo.reset()
        calls: dict[str, Callable[..., Any]] = {}
        cold: dict[str, float] = {}
        lacks: dict[str, str] = {}
        for name, function in found.items():
            if isinstance(function, Unavailable):
                lacks[name] = str(function)
                continue
            if name in COMPILED and not pace.allows_compiling(step):
                # The later passes are left out too: each would have to be compiled.
                found[name] = late = Unavailable(
                    "left out: compiling would overrun this run's time"
                )
                lacks[name] = str(late)
                continue
            graphs = _graphs()
            try:
                call = CALLS[mode](function, options)
                cold[name] = timing.once(partial(call, *inputs[0]), self.device)
                if name in COMPILED and _graphs() == graphs:
                    raise Unavailable("no graph was made: this would be eager again")
            except Exception as error:  # the row of this provider gives the reason
                found[name] = reason = Unavailable.because(error)
                lacks[name] = str(reason)
                continue
            if name in COMPILED:
                pace.compiling_took(cold[name])
            calls[name] = call
        rounds = (3, 30) if self.quick else (5, 200)
        with Telemetry(self.device) as seen:
            taken = timing.in_turns(
                calls, inputs, device=self.device, seconds=self.seconds, rounds=rounds
            )
        times = {name: Times.of(values) for name, values in taken.items()}
        conditions = seen.summary()
        for name in found:
            if name in lacks:
                yield (
                    {**head, "provider": name, "status": "not available", "reason": lacks[name]},
                    [],
                )
                continue
            row = {
                **head,
                "provider": name,
                "status": "measured",
                **asdict(times[name]),
                "cold_start": cold[name],
                **self._rates(mode, times[name], inputs[0], options),
                **_costs(found[name], calls[name], inputs[0], options, mode, self.device),
                "synchronisations": self._waits(name, calls[name], inputs[0]),
                "launches": self._launches(calls[name], inputs[0]) if thorough else None,
                **_compared(times.get(OURS), times[name], name),
                "sm_mhz": conditions["sm_mhz"],
                "power_w": conditions["power_w"],
                "temperature_c": conditions["temperature_c"],
                "throttled": conditions["throttled"],
            }
            yield row, taken[name]

    def _waits(self, name: str, call: Callable[..., Any], args: tuple[Any, ...]) -> int | None:
        if self.device == "cpu" and name in COMPILED:
            # They are counted under a dispatch mode, in which Dynamo stops compiling the function.
            return None
        return memory.host_syncs(lambda: call(*args), self.device)

    def _launches(self, call: Callable[..., Any], args: tuple[Any, ...]) -> int | None:
        return launches(lambda: call(*args), self.device)

    def _rates(
        self, mode: str, times: Times, inputs: tuple[Any, ...], options: Mapping[str, Any]
    ) -> Row:
        args = inputs if mode == "forward" else inputs[:-1]
        cost = self.op.cost_of(*args, **options)
        flops = moved = 0
        if "forward" in mode:
            flops, moved = cost.forward_flops, cost.forward_bytes
        if "backward" in mode:
            flops, moved = flops + cost.backward_flops, moved + cost.backward_bytes
        bandwidth, rate = moved / times.median, flops / times.median
        of_copy = bandwidth / self.best.copy_bytes_per_second
        of_matmul = rate / self.best.matmul_flops_per_second
        return {
            "gigabytes_per_second": bandwidth / 1e9,
            "teraflops_per_second": rate / 1e12,
            "of_copy": of_copy,
            "of_matmul": of_matmul,
            "of_floor": max(of_copy, of_matmul),
        }


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["frames"]["ok"])


def _costs(
    function: Any,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    options: Mapping[str, Any],
    mode: str,
    device: str,
) -> Row:
    """Bytes of a call: saved by the forward for backward, at the peak, and beyond its results."""
    saved = 0
    if mode == "forward+backward":
        leaves = [t for a in args[:-1] for t in (a if isinstance(a, list) else [a])]
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        saved = memory.saved_bytes(lambda: function(*args[:-1], **options), tensors)
    peak = memory.peak_bytes(lambda: call(*args), device)
    return {
        "saved_bytes": saved,
        "peak_bytes": peak,
        "transient_bytes": max(peak - memory.result_bytes(call(*args)), 0),
    }


def _compared(ours: Times | None, theirs: Times, name: str) -> Row:
    """How many times as long it takes as ours, and whether the quartiles are apart."""
    if ours is None or name == OURS:
        return {"ours_is": "", "times_faster": None}
    return {"ours_is": timing.verdict(ours, theirs), "times_faster": theirs.median / ours.median}


# ---- the table ----


def main(
    selection: Selection | None = None,
    *,
    quick: bool = False,
    device: str | None = None,
    deadline: float | None = None,
    add: Callable[[Row], None] = lambda row: None,
    **options: Any,
) -> list[Row]:
    """Measure, print a table, and return the rows; ``add`` is called with each row at once."""
    selection = selection or Selection()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Row] = []
    with timing.one_thread(), terminal.counter("timing") as count:
        for row, _ in measure(selection, quick=quick, device=device, deadline=deadline, **options):
            rows.append(row)
            add(row)
            count(len(rows), None)
    show(rows, device)
    return rows


def show(rows: Sequence[Row], device: str) -> None:
    """Print a line for each measured row, then why the others were not measured."""
    columns = (
        "op", "shape", "pass", "", "median", "quartiles", "of floor", "GB/s", "TFLOP/s",
        "saved MB", "peak MB", "waits", "ours is", "times",
    )  # fmt: skip
    measured = [row for row in rows if row["status"] == "measured"]
    cells = [
        (
            row["op"], row["shape"], row["mode"], row["provider"],
            f"{row['median'] * 1e3:.3f} ms",
            f"{row['lower'] * 1e3:.3f}-{row['upper'] * 1e3:.3f}", f"{row['of_floor']:.0%}",
            f"{row['gigabytes_per_second']:.1f}", f"{row['teraflops_per_second']:.3f}",
            f"{row['saved_bytes'] / 1e6:.1f}", f"{row['peak_bytes'] / 1e6:.1f}",
            "" if row["synchronisations"] is None else row["synchronisations"],
            row["ours_is"] + (", throttled" if row["throttled"] else ""),
            f"{row['times_faster']:.2f}" if row["times_faster"] else "",
        )
        for row in measured
    ]  # fmt: skip
    threads = ", one thread" if device == "cpu" else ""
    words = sorted({row["dtype"] for row in rows} | {row["scale"] for row in rows})
    terminal.show(f"ops on {machine.name(device)}{threads}, {', '.join(words)}", columns, cells)
    show_unavailable(rows)


def show_unavailable(rows: Sequence[Row]) -> None:
    """Print why providers could not be measured, each reason once."""
    lacks: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "measured":
            of = lacks.setdefault((row["provider"], row["reason"]), [])
            of += [row["op"]] if row["op"] not in of else []
    terminal.show(
        "not measured",
        ("provider", "ops", "reason"),
        [(name, ", ".join(of), why) for (name, why), of in lacks.items()],
    )
