"""Predicted device time of every op on an H200, its distance from the floor, and the cause."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vlm_fast.devtools.device_time import counts, pass_kernels
from vlm_fast.devtools.device_time.calibration import read_calibration
from vlm_fast.devtools.device_time.causes import time_by_cause
from vlm_fast.devtools.device_time.counts import Counts
from vlm_fast.devtools.device_time.model import Constants, Table, microseconds
from vlm_fast.ops.declaration import OPS, Cost, Op
from vlm_fast.verification import results_files

ARCH, MACHINE = "sm_90", "NVIDIA H200"  # of which the constants are
COPY_BYTES, PRODUCT_FLOPS = 4.3e6, 790e6  # of the GPU in a microsecond: the floor


@dataclass(frozen=True)
class Pass:
    """One pass of an op at a shape in bf16; times in microseconds.

    Attributes:
        predicted: by the model, from counts of today's kernels.
        floor: the least bytes at 4.3 TB/s or the products at 790 TFLOP/s, whichever is longer.
        causes: what the predicted time is spent on, the largest first.
        kernel: that spends most of the first cause.
        launches: of kernels, this package's and ATen's.
        measured: by the results file of an H200, of the source that it names; None if it has none.
        peer, peer_measured: the fastest other implementation there, and its time.
    """

    op: str
    shape: str
    mode: str
    predicted: float
    floor: float
    causes: Mapping[str, float]
    kernel: str
    launches: int
    measured: float | None
    peer: str | None
    peer_measured: float | None

    @property
    def above_floor(self) -> float:
        return self.predicted - self.floor


def report(
    names: Iterable[str] | None = None, progress: Callable[[int, int], None] | None = None
) -> list[Pass]:
    """Every pass of the ops at their bench shapes, the farthest from its floor first.

    Raises:
        RuntimeError: Triton is absent or interpreting.
        KeyError: an op is unknown.
    """
    ops = [OPS[name] for name in (OPS if names is None else names)]
    cases = [(op, label, shape) for op in ops for label, shape in op.bench_shapes.items()]
    measured = measured_times(results_files.read_results())
    constants = read_calibration()["constants"]
    found: list[Pass] = []
    for done, (op, label, shape) in enumerate(cases, start=1):
        cost = _cost(op, shape)
        for mode, kernels in pass_kernels.of_op(op, shape).items():
            if kernels:
                counted = counts.count(kernels, ARCH)
                times = measured.get((op.name, label, mode), {})
                found.append(_pass(op.name, label, mode, counted, cost, times, constants))
        if progress is not None:
            progress(done, len(cases))
    return sorted(found, key=lambda p: -p.above_floor)


def measured_times(results: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], dict[str, float]]:
    """Microseconds by provider of each op, shape and mode, measured on the machine of the model."""
    found: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for result in results:
        for row in result.get("ops", []) if result["machine"] == MACHINE else []:
            if row["status"] == "measured" and row["dtype"] == "bfloat16":
                where = found[row["op"], row["shape"], row["mode"]]
                where[row["provider"]] = row["median"] * 1e6
    return found


def _cost(op: Op[..., Any], shape: Mapping[str, Any]) -> Cost:
    with FakeTensorMode():
        values, settings = op.sample(shape, torch.bfloat16)
        return op.cost_of(*values, **settings)


def _pass(
    op: str,
    label: str,
    mode: str,
    counted: Sequence[Counts],
    cost: Cost,
    times: Mapping[str, float],
    constants: Constants,
) -> Pass:
    table = Table.of([counted])
    least, flops = cost.forward_bytes, cost.forward_flops
    if mode == "backward":
        least, flops = cost.backward_bytes, cost.backward_flops
    spent: dict[str, float] = defaultdict(float)
    kernels: dict[str, tuple[float, str]] = {}
    for cause, name, time in time_by_cause(counted, constants):
        spent[cause] += time
        kernels[cause] = max(kernels.get(cause, (0.0, name)), (time, name))
    causes = dict(sorted(spent.items(), key=lambda item: -item[1]))
    peers = {name: time for name, time in times.items() if name != "vlm_fast"}
    best = min(peers, key=lambda name: peers[name], default=None)
    return Pass(
        op, label, mode, microseconds(table, constants).item(),
        max(least / COPY_BYTES, flops / PRODUCT_FLOPS), causes, kernels[next(iter(causes))][1],
        len(counted), times.get("vlm_fast"), best, peers[best] if best else None,
    )  # fmt: skip
