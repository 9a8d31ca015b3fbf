"""Each op, pass and provider as a benchmark of pytest-benchmark, which stores and compares runs::

pytest benchmarks --benchmark-autosave
pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:10%
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vlm_fast.benchmarks import ops, providers
from vlm_fast.benchmarks.providers import Unavailable
from vlm_fast.devtools import timing
from vlm_fast.devtools.passes import CALLS, MODES, with_upstream
from vlm_fast.ops.declaration import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = DEVICE == "cpu"  # sizes that a CPU computes in milliseconds


def cases() -> Iterator[tuple[str, str, str, str]]:
    for op in OPS.values():
        peers = [peer.name for peer in providers.PEERS if peer.op == op.name]
        for shape, _ in ops.shapes_of(op, DEVICE, quick=QUICK):
            for mode in MODES[:1] if op.returns_indices else MODES:
                for provider in (providers.OURS, providers.EAGER, *providers.COMPILED, *peers):
                    yield op.name, shape, mode, provider


@pytest.mark.parametrize(("op", "shape", "mode", "provider"), cases())
def test_speed(benchmark: Any, op: str, shape: str, mode: str, provider: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()  # after another shape, Dynamo would compile for dynamic shapes
    sizes = dict(ops.shapes_of(OPS[op], DEVICE, quick=QUICK))[shape]
    args, options = OPS[op].sample(sizes, ops.DTYPE[DEVICE], DEVICE)
    function = providers.of(OPS[op], args, options, DEVICE)[provider]
    if isinstance(function, Unavailable):
        pytest.skip(str(function))
    call = CALLS[mode](function, options)
    inputs = args if mode == "forward" else with_upstream(OPS[op], args, options)
    try:
        call(*inputs)  # compiles, and allocates
    except Unavailable as reason:
        pytest.skip(str(reason))

    def until_done() -> None:
        call(*inputs)
        timing.wait(DEVICE)

    benchmark.group = f"{op}, {shape}, {mode}"
    with timing.one_thread():
        benchmark(until_done)
