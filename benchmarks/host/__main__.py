"""``python -m vlm_fast.benchmarks.host``: host time of patched connectors against unpatched ones.

It needs a GPU, or the stub libraries of ``make host``. On the stub nothing is computed: read ratios
and launches. A row is a connector of transformers at its model's sizes, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch

from vlm_fast.benchmarks.host import devices, frames
from vlm_fast.benchmarks.host.measure import CONNECTORS, RUNS, rows_of, show


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vlm_fast.benchmarks.host", description=__doc__)
    parser.add_argument("--ns", type=int, default=5000, help="cost of a launch on the stub")
    parser.add_argument("--only", default="", metavar="NAME", help="connectors whose name has this")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=RUNS, help="of which the best counts")
    parser.add_argument("--frames", action="store_true", help="list Python functions instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    if not torch.cuda.is_available():
        print("vlm_fast.benchmarks.host needs a GPU, or a stub of one: make host", file=sys.stderr)
        return 3
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if devices.is_stub():
        devices.set_cost(given.ns)
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN has no stub
    chosen = [c for c in CONNECTORS if given.only.lower() in c.name.lower()]
    if given.frames:
        for connector in chosen:
            frames.show(connector, given.batch[0])
        return 0
    rows, failures = [], 0
    for connector in chosen:
        try:
            rows += rows_of(connector, given.batch, given.runs)
        except Exception as error:  # the others still run
            failures += 1
            print(f"{connector.name}: {type(error).__name__}: {error}", file=sys.stderr)
        if given.json is not None:
            given.json.write_text(json.dumps({"ns": given.ns, "rows": rows}, indent=1) + "\n")
    if rows:
        show(rows)
    return 1 if failures or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
