"""Count what a results file measured: ``python -m ....count_measured NVIDIA_H200``.

Run it in the source that was measured, right after a run on a GPU: it counts the passes of that
results file, compiled for the GPU's architecture, and rewrites ``measured_counts.json``. Then
`vlm_fast.devtools.device_time.calibration` fits the constants again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import astuple
from typing import Any

from torch._subclasses.fake_tensor import DynamicOutputShapeException

import vlm_fast.ops  # noqa: F401  declares the ops
from vlm_fast.devtools.device_time import counts, pass_kernels
from vlm_fast.devtools.device_time.counts import Counts
from vlm_fast.devtools.device_time.measured_rows import COUNTS, key
from vlm_fast.devtools.device_time.pass_kernels import AtenKernel
from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import results_files

PROVIDERS = {"vlm_fast": pass_kernels.of_op, "eager": pass_kernels.of_reference}


def rows(results: Mapping[str, Any], arch: str) -> Iterator[list[Any]]:
    """Op, shape, provider, mode and counted kernels of each measured pass in bf16.

    An op whose source is not the measured one is left out, and a reference that asks for a count.
    """
    measured = {key(row) for row in results["ops"] if row["status"] == "measured"}
    for op in OPS.values():
        if results["sources"].get(op.name) != results_files.sources(op):
            print(f"{op.name}: left out, its source is not the measured one", file=sys.stderr)
            continue
        for label, shape in op.bench_shapes.items():
            for provider, passes_of in PROVIDERS.items():
                try:
                    passes = passes_of(op, shape)
                except DynamicOutputShapeException:
                    continue
                for mode, kernels in passes.items():
                    if kernels and (op.name, label, provider, mode) in measured:
                        found = counts.count(kernels, arch)
                        yield [op.name, label, provider, mode, [values(k) for k in found]]


def values(kernel: Counts) -> list[Any]:
    """A kernel as it is written to the file of counts."""
    if isinstance(kernel, AtenKernel):
        return [kernel.name, kernel.bytes, *kernel.sizes]
    return list(astuple(kernel))


def main() -> None:
    name = f"{sys.argv[1].removesuffix('.json')}.json"
    results = json.loads((results_files.RESULTS / name).read_text())
    arch = results["capability"]
    found = ",\n".join("  " + json.dumps(row) for row in rows(results, arch))
    head = {"results": name, "commit": results["commit"], "arch": arch}
    COUNTS.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{found}\n ]\n}}\n')


if __name__ == "__main__":
    main()
