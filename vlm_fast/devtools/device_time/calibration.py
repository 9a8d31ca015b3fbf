"""Fit the model's constants to a results file, and say how wrong it is about what it has not seen.

``python -m vlm_fast.devtools.device_time.calibration`` fits the constants to the rows that
`measured_rows` reads, and rewrites ``calibration.json``.

The error of the model is that of ops that it has not seen: one op at a time is left out, the
constants are fitted without any row of it, nor of a kernel that it launches, and predict its rows.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlm_fast.devtools.device_time.counts import KernelCounts
from vlm_fast.devtools.device_time.measured_rows import CONFIG, COUNTS, Row, read_rows
from vlm_fast.devtools.device_time.model import BOUNDS, Constants, Table, microseconds

CALIBRATION = Path(__file__).resolve().parent / "calibration.json"
WEIGHT = {CONFIG: 0.5}  # many of these rows are the same kernel


def fit(rows: Sequence[Row], start: Constants | None = None) -> dict[str, float]:
    """Constants for which the squares of the logarithms of predicted / measured are least.

    Large deviations count linearly (``soft_l1``), so that a few rows do not decide.
    """
    import numpy as np
    from scipy.optimize import least_squares

    table = Table.of([row.counts for row in rows], [row.unseen for row in rows])
    target = torch.tensor([row.measured for row in rows], dtype=torch.float64).log()
    weight = torch.tensor([WEIGHT.get(row.provider, 1.0) for row in rows], dtype=torch.float64)

    def deviations(logs: Any) -> Any:
        constants = dict(zip(BOUNDS, np.exp(logs).tolist(), strict=True))
        return (weight * (microseconds(table, constants).log() - target)).numpy()

    lower, upper = (np.log([bounds[i] for bounds in BOUNDS.values()]) for i in (1, 2))
    first = np.log([(start or {}).get(name, BOUNDS[name][0]) for name in BOUNDS])
    first = np.clip(first, lower + 1e-6, upper - 1e-6)
    found = least_squares(
        deviations, first, bounds=(lower, upper), loss="soft_l1", f_scale=0.3, max_nfev=60
    )
    return dict(zip(BOUNDS, np.exp(found.x).tolist(), strict=True))


def errors(rows: Sequence[Row], constants: Constants) -> list[float]:
    """Relative error of each prediction: |predicted / measured - 1|."""
    table = Table.of([row.counts for row in rows], [row.unseen for row in rows])
    times = microseconds(table, constants).tolist()
    return [abs(time / row.measured - 1) for time, row in zip(times, rows, strict=True)]


def left_out(rows: Sequence[Row], constants: Constants) -> dict[str, list[tuple[Row, float]]]:
    """By op: its rows with the errors of constants that were fitted without the op."""
    found = {}
    for op in dict.fromkeys(row.op for row in rows):
        own = [row for row in rows if row.op == op and row.provider != CONFIG]
        counted = [kernel for row in own for kernel in row.counts]
        kernels = {kernel.name for kernel in counted if isinstance(kernel, KernelCounts)}
        others = [
            row for row in rows
            if row.op != op and not (row.provider == CONFIG and row.mode in kernels)
        ]  # fmt: skip
        found[op] = list(zip(own, errors(own, fit(others, constants)), strict=True)) if own else []
    return found


def calibrate(path: Path = COUNTS) -> dict[str, Any]:
    """The content of ``calibration.json``: constants, and the errors of ops that were left out."""
    rows = read_rows(path)
    constants = fit(rows)
    by_op = left_out(rows, constants)
    summary = {}
    for provider in ("vlm_fast", "eager"):
        of_provider = {
            op: [error for row, error in pairs if row.provider == provider]
            for op, pairs in by_op.items()
        }
        every = sorted(error for found in of_provider.values() for error in found)
        summary[provider] = {
            "rows": len(every),
            "median": round(statistics.median(every), 3),
            "ninetieth_percentile": round(every[int(0.9 * len(every))], 3),
            "median_by_op": {
                op: round(statistics.median(found), 3) for op, found in of_provider.items() if found
            },
        }
    content = json.loads(path.read_text())
    return {
        "results": content["results"],
        "commit": content["commit"],
        "constants": {name: float(f"{value:.4g}") for name, value in constants.items()},
        "left_out_error": summary,
    }


def read_calibration() -> dict[str, Any]:
    """The shipped calibration."""
    return json.loads(CALIBRATION.read_text())


def main() -> None:
    found = calibrate()
    CALIBRATION.write_text(json.dumps(found, indent=1) + "\n")
    for provider, error in found["left_out_error"].items():
        print(f"{provider}: {error['rows']} rows, median {error['median']:.0%} off when left out")


if __name__ == "__main__":
    main()
