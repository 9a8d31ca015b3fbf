"""Host time and launches of a connector, patched and unpatched, in inference and training."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import vlm_fast
from vlm_fast import terminal
from vlm_fast.benchmarks.host import devices
from vlm_fast.benchmarks.host.connector import Connector
from vlm_fast.benchmarks.host.gated_layers import GATED_LAYERS
from vlm_fast.benchmarks.host.mergers import MERGERS
from vlm_fast.benchmarks.host.merges import MERGES
from vlm_fast.benchmarks.host.projectors import PROJECTORS
from vlm_fast.benchmarks.host.resamplers import RESAMPLERS

Row = dict[str, Any]
CONNECTORS = (*PROJECTORS, *MERGERS, *RESAMPLERS, *GATED_LAYERS, *MERGES)
# One connector of each kind, for a short run.
FEW = (
    "LLaVA-1.5-7B merge", "LLaVA-1.5-7B projector", "BLIP-2 Q-Former, 2 layers",
    "IDEFICS-9B gated layer",
)  # fmt: skip
COLUMNS = ("connector", "batch", "", "unpatched us", "patched us", "ratio", "launches")
MODES = ("inference", "training")
SECONDS = 0.02  # of a run of calls
RUNS = 8


@contextlib.contextmanager
def creating(device: str) -> Iterator[None]:
    """Create tensors on a device in bfloat16. It would slow every torch call that is timed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build(connector: Connector, device: str = "cuda") -> tuple[nn.Module, nn.Module]:
    """The module as its model has it, and a patched copy; ValueError if nothing is patched."""
    if devices.is_stub():
        devices.set_read(-1)  # random numbers are drawn until a condition is false
    with creating(device):
        before = connector.make().eval()
    after = copy.deepcopy(before)
    report = vlm_fast.patch(after)
    if not report.patched:
        raise ValueError(f"{connector.name}: nothing is patched\n{report}")
    return before, after


def inference(connector: Connector, module: nn.Module, given: tuple[Any, ...]) -> Callable[[], Any]:
    """A call without gradients."""

    def call() -> Any:
        with torch.no_grad():
            return connector.call(module, *given)

    return call


def training(connector: Connector, module: nn.Module, given: tuple[Any, ...]) -> Callable[[], Any]:
    """A call and its backward, for the inputs and parameters that get a gradient."""
    leaves = [*module.parameters(), *tree_leaves(given)]
    leaves = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]

    def results() -> list[Tensor]:
        found = connector.call(module, *given)
        leaves = [found] if isinstance(found, Tensor) else tree_leaves(found)
        return [value for value in leaves if isinstance(value, Tensor) and value.requires_grad]

    upstream = [torch.zeros_like(value) for value in results()]
    gradients = torch.autograd.grad(results(), leaves, upstream, allow_unused=True)
    wanted = [leaf for leaf, found in zip(leaves, gradients, strict=True) if found is not None]
    return lambda: torch.autograd.grad(results(), wanted, upstream)


def measured(calls: Sequence[Callable[[], Any]], runs: int) -> tuple[list[int], list[float]]:
    """Launches and microseconds of each call, after three that compile kernels and fill caches."""
    for call in calls:
        for _ in range(3):
            call()
    counts = [devices.launches(call) for call in calls]
    slowest = max(devices.best_times(calls, 1, 3))
    return counts, devices.best_times(calls, max(4, round(SECONDS * 1e6 / slowest)), runs)


def rows_of(
    connector: Connector, batches: Sequence[int], runs: int = RUNS, device: str = "cuda"
) -> Iterator[Row]:
    """A row for each batch and mode; times in microseconds."""
    before, after = build(connector, device)
    for batch in batches:
        if devices.is_stub():
            devices.set_read(connector.counted(batch))
        with creating(device):
            given = connector.given(batch)
        for mode, make in zip(MODES, (inference, training), strict=True):
            calls = [make(connector, module, given) for module in (before, after)]
            counts, times = measured(calls, runs)
            yield {
                "connector": connector.name, "batch": batch, "mode": mode,
                "before_us": times[0], "after_us": times[1], "ratio": times[1] / times[0],
                "launches_before": counts[0], "launches_after": counts[1],
            }  # fmt: skip


def main(
    names: Sequence[str],
    *,
    batches: Sequence[int],
    device: str = "cuda",
    deadline: float = math.inf,
) -> dict[str, Any]:
    """Measure these connectors and print a table; "finished" tells if the time was enough.

    No batch of a connector is begun after ``deadline`` (of ``time.monotonic``).
    """
    chosen = [connector for connector in CONNECTORS if connector.name in names]
    rows: list[Row] = []
    finished = True
    for connector, batch in itertools.product(chosen, batches):
        if time.monotonic() > deadline:
            finished = False
            break
        rows += rows_of(connector, [batch], device=device)
    if rows:
        show(rows)
    return {"rows": rows, "finished": finished}


def show(rows: Sequence[Row]) -> None:
    """Print rows, the highest ratio first, and their mean."""
    rows = sorted(rows, key=lambda row: -row["ratio"])
    cells = [
        (row["connector"], row["batch"], row["mode"], f"{row['before_us']:.1f}",
         f"{row['after_us']:.1f}", f"{row['ratio']:.2f}",
         f"{row['launches_before']} -> {row['launches_after']}")
        for row in rows
    ]  # fmt: skip
    worst = rows[0]
    terminal.show(f"host time, {devices.description()}", COLUMNS, cells)
    print(
        f"patched / unpatched: mean {mean_ratio(rows):.3f}, worst {worst['ratio']:.2f} "
        f"({worst['connector']}, batch {worst['batch']}, {worst['mode']}); "
        f"{sum(row['ratio'] > 1 for row in rows)} of {len(rows)} rows above 1"
    )


def mean_ratio(rows: Sequence[Row]) -> float:
    """The geometric mean of the ratios."""
    return math.exp(sum(math.log(row["ratio"]) for row in rows) / len(rows))
