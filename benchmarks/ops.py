"""Every op at its named shapes, against its reference, eager and compiled, and its peers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, peers
from vlm_fast import tables
from vlm_fast.measure import memory, timing
from vlm_fast.measure.passes import with_upstream
from vlm_fast.measure.timing import Ceilings, Times
from vlm_fast.op import OPS, Op
from vlm_fast.parity import differentiable, gradients
from vlm_fast.selftest import one_sample, shrink

Row = dict[str, Any]
OURS = "vlm_fast"
MODES = ("forward", "forward+backward")
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
INPUTS = 2  # sets in rotation


def main(names: Iterable[str], *, quick: bool = False, device: str | None = None) -> list[Row]:
    """Measure, print a table, and return the rows."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Row] = []
    with timing.one_thread(), tables.counter("timing") as count:
        for row in measure(names, quick=quick, device=device):
            rows.append(row)
            count(len(rows), None)
    show(rows, device)
    return rows


def measure(
    names: Iterable[str],
    *,
    quick: bool = False,
    device: str,
    seconds: float | None = None,
    compile_all: bool = True,
) -> Iterable[Row]:
    """The rows, a provider each.

    ``quick`` is one small shape an op, and no torch.compile; without ``compile_all`` only the first
    shape of an op is compiled.
    """
    seconds = seconds or (0.2 if quick else 2.0)
    dtype = DTYPE[device]
    best = timing.ceilings(device, dtype)
    for name in names:
        op = OPS[name]
        for label, shape in op.bench_shapes.items():
            if device == "cpu":
                shape, label = one_sample(shape), f"{label}: one sample"
            if quick:
                shape, label = shrink(one_sample(shape)), f"{label}, sizes / 8"
            compiled = not quick and (compile_all or label == next(iter(op.bench_shapes)))
            yield from _measure_shape(
                op, label, shape, dtype, device, best, quick, seconds, compiled
            )
            if quick:
                break


def _measure_shape(
    op: Op[..., Any],
    label: str,
    shape: Mapping[str, Any],
    dtype: torch.dtype,
    device: str,
    best: Ceilings,
    quick: bool,
    seconds: float,
    compiled: bool,
) -> Iterable[Row]:
    torch.manual_seed(0)
    samples = [op.sample(shape, dtype, device) for _ in range(INPUTS)]
    options = samples[0][1]
    providers: dict[str, Callable[..., Any]] = {OURS: op, "eager": op.reference}
    providers |= peers.of(op.name, *samples[0])
    if compiled:
        torch._dynamo.reset()  # the last shape would make this one a dynamic shape
        providers["torch.compile"] = torch.compile(op.reference)
    cost = op.cost_of(*samples[0][0], **options)
    for mode in MODES[:1] if op.discrete else MODES:
        backward = mode != "forward"
        if backward:
            inputs = [with_upstream(op, args, options) for args, _ in samples]
            flops = cost.forward_flops + cost.backward_flops
            moved = cost.forward_bytes + cost.backward_bytes
        else:
            inputs = [args for args, _ in samples]
            flops, moved = cost.forward_flops, cost.forward_bytes
        calls = {
            provider: _call(function, options, backward) for provider, function in providers.items()
        }
        limits = (3, 50) if quick else (5, 200)
        times = timing.interleaved(calls, inputs, device=device, seconds=seconds, rounds=limits)
        for provider, call in calls.items():
            yield {
                "op": op.name,
                "shape": label,
                "dtype": str(dtype).removeprefix("torch."),
                "mode": mode,
                "provider": provider,
                **_rates(times[provider], flops, moved, best),
                **_memory(providers[provider], call, inputs[0], options, backward, device),
                "ours_is": timing.verdict(times[OURS], times[provider]) if provider != OURS else "",
            }


def _call(
    function: Callable[..., Any], options: Mapping[str, Any], backward: bool
) -> Callable[..., Any]:
    def forward(*args: Any) -> Any:
        with torch.no_grad():
            return function(*args, **options)

    def both(*args: Any) -> Any:
        *args, upstream = args
        results = function(*args, **options)
        results = results if isinstance(results, tuple) else (results,)
        return gradients(results, differentiable(args), upstream)

    return both if backward else forward


def _rates(times: Times, flops: int, moved: int, best: Ceilings) -> Row:
    bandwidth, rate = moved / times.median, flops / times.median
    return {
        **asdict(times),
        "gigabytes_per_second": bandwidth / 1e9,
        "teraflops_per_second": rate / 1e12,
        "of_copy": bandwidth / best.copy_bytes_per_second,
        "of_matmul": rate / best.matmul_flops_per_second,
    }


def _memory(
    function: Callable[..., Any],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    options: Mapping[str, Any],
    backward: bool,
    device: str,
) -> Row:
    saved = 0
    if backward:
        leaves = [t for a in args[:-1] for t in (a if isinstance(a, list) else [a])]
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        saved = memory.saved_bytes(lambda: function(*args[:-1], **options), tensors)
    return {
        "saved_bytes": saved,
        "peak_bytes": memory.peak_bytes(lambda: call(*args), device),
        "synchronisations": memory.synchronisations(lambda: call(*args), device),
    }


def show(rows: list[Row], device: str) -> None:
    columns = (
        "op", "shape", "pass", "", "median", "quartiles", "GB/s", "of copy", "TFLOP/s", "of matmul",
        "saved MB", "peak MB", "waits", "ours is",
    )  # fmt: skip
    cells = [
        (
            row["op"], row["shape"], row["mode"], row["provider"],
            f"{row['median'] * 1e3:.3f} ms",
            f"{row['lower'] * 1e3:.3f}-{row['upper'] * 1e3:.3f}",
            f"{row['gigabytes_per_second']:.1f}", f"{row['of_copy']:.0%}",
            f"{row['teraflops_per_second']:.3f}", f"{row['of_matmul']:.0%}",
            f"{row['saved_bytes'] / 1e6:.1f}", f"{row['peak_bytes'] / 1e6:.1f}",
            row["synchronisations"], row["ours_is"],
        )
        for row in rows
    ]  # fmt: skip
    threads = ", one thread" if device == "cpu" else ""
    dtype = str(DTYPE[device]).removeprefix("torch.")
    tables.show(f"ops on {machine.name(device)}{threads}, {dtype}", columns, cells)
