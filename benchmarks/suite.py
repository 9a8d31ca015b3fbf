"""The sections of the benchmark, and the results file that they fill as they go.

If a run ends early (Ctrl-C, SIGTERM, an error in a section), its file is valid and says that the
run is not finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
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
QUICK_SECONDS = 150.0  # for the ops of a quick run; the other sections take half a minute together
# Seconds for which the providers of one op take turns, and those for which a model's parts do.
SECONDS = {"cpu": (0.5, 4.0), "cuda": (2.0, 10.0)}
WRITE_EVERY = 2.0  # seconds


@dataclass
class Run:
    """One run of the benchmark: its options, and the results so far."""

    device: str
    quick: bool
    selection: Selection
    path: Path | None
    results: Results
    written: float = 0.0

    def write(self, *, now: bool = True) -> None:
        """Write the results so far; without ``now`` only if `WRITE_EVERY` seconds have passed."""
        if self.path is not None and (now or time.monotonic() - self.written > WRITE_EVERY):
            machine.write(self.path, self.results)
            self.written = time.monotonic()


def parity(run: Run) -> None:
    """Check every op against its reference; nothing is timed after a failure."""
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
        thorough=run.device != "cpu",  # on a CPU torch.compile at one shape of an op is enough
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
    table: Mapping[str, Callable[[Run], None]] | None = None,
) -> Results:
    """Run sections in the given order, and write what they find to ``path`` as it is found.

    Args:
        sections: names in ``table``.
        device: "cpu" or "cuda".
        quick: small sizes and few repeats.
        selection: of ops, shapes, passes, providers and dtype.
        path: of the results file; None writes no file.
        table: functions by the names of sections; `SECTIONS` by default.

    Returns:
        The results. "finished" is False after an interruption, and "failures" names the sections
        that raised. A section that raises does not end the run, except "parity".
    """
    table = SECTIONS if table is None else table
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
                    table[name](current)
                except Exception as error:  # the other sections still run
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
