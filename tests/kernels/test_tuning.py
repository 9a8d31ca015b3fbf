"""Proof and measurement of configs, with kernels that run: no GPU, so their times mean nothing."""

import time

import pytest
import torch

from vlm_fast.devtools import timing, tuning
from vlm_fast.kernels._launcher import KERNELS, Config
from vlm_fast.ops.declaration import OPS

pytestmark = pytest.mark.devices("interpreter")

NAME = "spatial_pool_kernel"


def test_wrong_and_failing_configs_are_left_out_and_named(monkeypatch):
    kernel = KERNELS[NAME]
    first = kernel.configs[0]
    monkeypatch.setattr(kernel, "configs", (first, Config({"NO_SUCH_BLOCK": 8})))
    monkeypatch.setattr(tuning, "_ops_of_kernels", lambda: {NAME: ["spatial_pool"]})
    launch = tuning.Kernel.__call__
    count = iter(range(10**6))

    def spoilt(self, size, grid, *arguments):
        index = kernel.choose(arguments[0], size) if self is kernel else None
        launch(self, size, grid, *arguments)
        if index is first and wrong:
            next(a for a in arguments[1:] if isinstance(a, torch.Tensor)).fill_(next(count))

    wrong = False
    monkeypatch.setattr(tuning.Kernel, "__call__", spoilt)
    found = {c.config: c.failures for c in tuning.prove(["spatial_pool"], device="cpu")}
    assert not found[0] and "raised" in found[1][0]
    wrong = True
    assert next(tuning.prove(["spatial_pool"], device="cpu")).failures[0].startswith("spatial_pool")


def test_a_config_that_no_check_launches_is_not_right(monkeypatch):
    monkeypatch.setattr(tuning, "_ops_of_kernels", lambda: {NAME: ["gated_mlp"]})
    found = next(tuning.prove(["gated_mlp"], device="cpu"))
    assert found.failures == (f"{NAME}: no check launches it",)


def test_time_that_is_up_proves_nothing(monkeypatch):
    monkeypatch.setattr(tuning, "_ops_of_kernels", lambda: {NAME: ["spatial_pool"]})
    (cut,) = tuning.prove(["spatial_pool"], device="cpu", deadline=time.monotonic() - 1)
    assert cut.failures == ("out of time",)
    assert tuning.measure({NAME: [0, 1]}, device="cpu", deadline=time.monotonic() - 1) == (
        [],
        False,
    )


def test_right_configs_are_measured_once_a_size(monkeypatch):
    op = OPS["spatial_pool"]
    shape = {**op.test_shapes[1]}
    monkeypatch.setattr(op, "bench_shapes", {"one": shape, "the same": shape})
    seen = []

    def interleaved(calls, inputs, **_):
        seen.append(list(calls))
        for call in calls.values():
            call()  # it can be launched alone
        return {name: timing.Times.of([1.0 / (1 + int(name))]) for name in calls}

    monkeypatch.setattr(timing, "interleaved", interleaved)
    right = {NAME: [0, 2], "spatial_pool_backward_kernel": [1, 2]}  # its default is not right
    rows, finished = tuning.measure(right, ["spatial_pool"], dtypes=[torch.float32], device="cpu")
    assert finished and seen == [["0", "2"]] and [row["config"] for row in rows] == [0, 2]
    assert tuning.selection(rows) == {NAME: {"float32": {str(rows[0]["size"]): 2}}}
