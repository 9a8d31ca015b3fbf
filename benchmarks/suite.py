"""The sections of the benchmark, and the results file that they fill as they go.

Whatever ends a run early (Ctrl-C, SIGTERM, an error in a section) leaves a file that is valid and
says that it is not finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from vlm_fast.benchmarks import (
    anyres_packing,
    gated_cross_attention,
    image_token_merge,
    machine,
    models,
    op_overhead,
    ops,
    patch_mergers,
    qformer,
    token_merging,
)
from vlm_fast.benchmarks.ops import Selection
from vlm_fast.devtools.telemetry import Telemetry
from vlm_fast.signals import handled
from vlm_fast.verification import self_test

Results = dict[str, Any]
QUICK_SECONDS = 150.0  # of the ops; what else is quick takes less than half a minute
# How long the ways to do one thing take turns: an op's providers, the parts of models.
SECONDS = {"cpu": (0.5, 4.0), "cuda": (2.0, 10.0)}
WRITE_EVERY = 2.0  # seconds


@dataclass
class Run:
    """One run of the benchmark: what is asked of it, and where its results go."""

    device: str
    quick: bool
    selection: Selection
    path: Path | None
    results: Results
    written: float = 0.0

    def write(self, *, now: bool = True) -> None:
        """Write the results so far; without ``now`` only every other second."""
        if self.path is not None and (now or time.monotonic() - self.written > WRITE_EVERY):
            machine.write(self.path, self.results)
            self.written = time.monotonic()


def parity(run: Run) -> None:
    """Every op against its reference: what a wrong kernel takes is of no interest."""
    wanted = run.selection.ops
    run.results["parity"] = summary = self_test.summarise(self_test.run(wanted, device=run.device))
    failures = [line for entry in summary.values() for line in entry["failures"]]
    if failures:
        raise AssertionError("\n".join(failures))


def every_op(run: Run) -> None:
    run.results["ops"] = rows = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        run.write(now=False)

    deadline = time.monotonic() + QUICK_SECONDS if run.quick else None
    ops.main(
        run.selection,
        quick=run.quick,
        device=run.device,
        deadline=deadline,
        add=add,
        seconds=None if run.quick else SECONDS[run.device][0],
        thorough=run.device != "cpu",  # where what is compiled for one shape says enough
    )


def python_overhead(run: Run) -> None:
    run.results["op_overhead"] = op_overhead.main(quick=run.quick, device=run.device)


def whole_models(run: Run) -> None:
    found = run.results["models"] = {}
    models.main(quick=run.quick, device=run.device, seconds=SECONDS[run.device][1], found=found)


def family(module: ModuleType) -> Callable[[Run], None]:
    name = module.__name__.rpartition(".")[2]

    def measured(run: Run) -> None:
        run.results[name] = module.main(
            quick=run.quick, device=run.device, seconds=SECONDS[run.device][1]
        )

    return measured


SECTIONS: dict[str, Callable[[Run], None]] = {
    "parity": parity,
    "ops": every_op,
    "op_overhead": python_overhead,
    "models": whole_models,
    **{
        module.__name__.rpartition(".")[2]: family(module)
        for module in (
            image_token_merge,
            qformer,
            gated_cross_attention,
            anyres_packing,
            token_merging,
            patch_mergers,
        )
    },
}


def run(
    sections: Sequence[str],
    *,
    device: str,
    quick: bool = False,
    selection: Selection | None = None,
    path: Path | None = None,
) -> Results:
    """Run the sections in their order, and write what they find to ``path`` as it is found.

    The result's "finished" is False where it was interrupted, and "failures" names the sections
    that broke; the others are run all the same, but for what follows a failed parity.
    """
    with Telemetry(device) as seen:
        pass
    results: Results = {
        **machine.description(device),
        "quick": quick,
        "finished": False,
        "failures": [],
        "telemetry": seen.summary(),
    }
    current = Run(device, quick, selection or Selection(), path, results)
    try:
        with handled():
            for name in sections:
                try:
                    SECTIONS[name](current)
                except Exception as error:  # a section that breaks does not take the others with it
                    results["failures"].append(f"{name}: {type(error).__name__}: {error}")
                    if name == "parity":
                        break
                current.write()
            results["finished"] = True
    except KeyboardInterrupt:
        results["failures"].append("interrupted")
    finally:
        current.write()
    return results
