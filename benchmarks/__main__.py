"""``python -m benchmarks``: ops, overhead and whole connectors, on the GPU if there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import (
    anyres,
    flamingo,
    machine,
    merge,
    mergers,
    models,
    ops,
    overhead,
    qformer,
    tokens,
)
from vlm_fast import selftest
from vlm_fast.op import OPS


def main(
    quick: Annotated[bool, typer.Option(help="Smaller shapes, fewer repeats.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write results here.")] = None,
    save: Annotated[
        bool, typer.Option(help="Write them to benchmarks/results/<machine>.json too.")
    ] = False,
) -> None:
    """Parity of every op, then times, memory and overhead; prints tables."""
    if quick and save:
        raise typer.BadParameter("quick results are not worth keeping", param_hint="--save")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = machine.description(device)
    results["quick"] = quick
    results["parity"] = selftest.summarise(selftest.run(device=device))
    failures = [line for entry in results["parity"].values() for line in entry["failures"]]
    for line in failures:
        print(line)
    if failures:
        # What a wrong kernel takes is of no interest.
        raise typer.Exit(1)
    results["ops"] = ops.main(OPS, quick=True if device == "cpu" else quick, device=device)
    results["overhead"] = overhead.main(quick=quick, device=device)
    results["models"] = models.main(quick=quick, device=device)
    results["merge"] = merge.main(quick=quick, device=device)
    results["qformer"] = qformer.main(quick=quick, device=device)
    results["flamingo"] = flamingo.main(quick=quick, device=device)
    results["anyres"] = anyres.main(quick=quick, device=device)
    results["tokens"] = tokens.main(quick=quick, device=device)
    results["mergers"] = mergers.main(quick=quick, device=device)
    if json_file is not None:
        machine.write(json_file, results)
    if save:
        machine.write(machine.results_file(results["machine"]), results)


if __name__ == "__main__":
    typer.run(main)
