"""``python -m vlm_fast.benchmarks.host``: host time of patched connectors against unpatched ones.

It needs a GPU, or the stub libraries of ``make host``. On the stub nothing is computed: read ratios
and launches. A row is a connector of transformers at its model's sizes, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch

from vlm_fast import terminal
from vlm_fast.benchmarks.host import devices
from vlm_fast.benchmarks.host.measure import CONNECTORS, RUNS, mean_ratio, rows_of

COLUMNS = ("connector", "batch", "", "unpatched us", "patched us", "ratio", "launches")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vlm_fast.benchmarks.host", description=__doc__)
    parser.add_argument("--ns", type=int, default=5000, help="cost of a launch on the stub")
    parser.add_argument("--only", default="", metavar="NAME", help="connectors whose name has this")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=RUNS, help="of which the best counts")
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
    start, rows, failures = time.monotonic(), [], 0
    for connector in CONNECTORS:
        if given.only.lower() in connector.name.lower():
            try:
                rows += rows_of(connector, given.batch, given.runs)
            except Exception as error:
                failures += 1
                print(f"{connector.name}: {type(error).__name__}: {error}", file=sys.stderr)
            if given.json is not None:
                given.json.write_text(json.dumps({"ns": given.ns, "rows": rows}, indent=1) + "\n")
    if not rows:
        return 1
    rows.sort(key=lambda row: -row["ratio"])
    cells = [
        (row["connector"], row["batch"], row["mode"], f"{row['before_us']:.1f}",
         f"{row['after_us']:.1f}", f"{row['ratio']:.2f}",
         f"{row['launches_before']} -> {row['launches_after']}")
        for row in rows
    ]  # fmt: skip
    machine = (
        f"a stub GPU, {given.ns / 1000:g} us a launch"
        if devices.is_stub()
        else (torch.cuda.get_device_name())
    )
    terminal.show(f"host time on {machine}; torch {torch.__version__}", COLUMNS, cells)
    worst = rows[0]
    print(
        f"patched / unpatched: mean {mean_ratio(rows):.3f}, worst {worst['ratio']:.2f} "
        f"({worst['connector']}, batch {worst['batch']}, {worst['mode']}); "
        f"{sum(row['ratio'] > 1 for row in rows)} of {len(rows)} rows above 1; "
        f"{time.monotonic() - start:.0f} s"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
