"""Measured times of an H200, with counts of the kernels that were measured.

The times are those of ``benchmarks/results``, the counts those of ``measured_counts.json``: of the
source at the commit that both files name, as `count_measured` counted it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_fast.devtools.device_time.counts import Counts, KernelCounts
from vlm_fast.devtools.device_time.pass_kernels import AtenKernel
from vlm_fast.verification import results_files

COUNTS = Path(__file__).resolve().parent / "measured_counts.json"
HOST = 80.0, 35.0  # microseconds that this package's and ATen's launches took the host
HEAD_START = 900.0  # microseconds; passes whose launches take the host longer measure the host
CONFIG = "config"  # provider of a row that is one kernel with one config


@dataclass(frozen=True)
class Row:
    """A measured pass, or kernel, with its counts.

    Attributes:
        op, shape, provider, mode: as in the results file; of a kernel with a config, the provider
            is `CONFIG` and the mode the kernel's name.
        counts: of its kernels.
        unseen: launches that were measured beyond the counted ones.
        measured: microseconds.
    """

    op: str
    shape: str
    provider: str
    mode: str
    counts: tuple[Counts, ...]
    unseen: int
    measured: float


def read_rows(path: Path = COUNTS) -> list[Row]:
    """The rows of the file of counts with their times; those that measured the host are left out.

    Raises:
        FileNotFoundError: the results file is not there.
        ValueError: the counts are of another run than the results.
    """
    content = json.loads(path.read_text())
    results = json.loads((results_files.RESULTS / content["results"]).read_text())
    if results["commit"] != content["commit"]:
        raise ValueError(
            f"{path.name} counts the source of commit {content['commit']}, {content['results']} "
            f"measured that of {results['commit']}: run count_measured and calibration"
        )
    measured = {key(row): row for row in results["ops"] if row["status"] == "measured"}
    configs = {
        (f"{row['dtype']}, {row['size']}, config {row['config']}", row["kernel"]): row["median"]
        for row in results.get("configs", ())
    }
    launches = {
        (row["op"], row["provider"], row["mode"]): row["launches"]
        for row in measured.values()
        if row["launches"] is not None
    }
    found = []
    for op, shape, provider, mode, kernels in content["rows"]:
        counts = tuple(map(as_counts, kernels))
        if provider == CONFIG:
            found.append(Row(op, shape, CONFIG, mode, counts, 0, configs[shape, mode] * 1e6))
            continue
        unseen = max(0, (launches.get((op, provider, mode)) or 0) - len(counts))
        seconds = measured[op, shape, provider, mode]["median"]
        row = Row(op, shape, provider, mode, counts, unseen, seconds * 1e6)
        if not measures_the_host(row):
            found.append(row)
    return found


def key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return row["op"], row["shape"], row["provider"], row["mode"]


def measures_the_host(row: Row) -> bool:
    """Whether launching took so long, or waited for the GPU, that the time is not the GPU's."""
    ours = sum(isinstance(kernel, KernelCounts) for kernel in row.counts)
    host = ours * HOST[0] + (len(row.counts) - ours + row.unseen) * HOST[1]
    waits = any("masked_scatter" in kernel.name for kernel in row.counts)  # it asks for a count
    return host > HEAD_START or waits


def as_counts(values: Sequence[Any]) -> Counts:
    """A kernel as `count_measured.values` wrote it."""
    name, *rest = values
    if name.startswith("aten."):
        return AtenKernel(name, rest[0], tuple(rest[1:]))
    return KernelCounts(name, *rest)
