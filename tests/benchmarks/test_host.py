"""The benchmark of host time: its connectors, and how a row is measured."""

import functools
import json
import os
import time

import pytest
import torch
from torch import nn

from tests.support import reference_flamingo, stub_gpu, stub_kernels, tiny_llava
from vlm_fast.benchmarks import gpu_checks, gpu_stages
from vlm_fast.benchmarks.host import frames, gated_layers
from vlm_fast.benchmarks.host import measure as host
from vlm_fast.benchmarks.host.connector import Connector, features
from vlm_fast.patching.families import FAMILIES

# Their layers have rows, with the masks that these models prepare.
MODELS_OF_LAYERS = {"FusedIdeficsModel", "FusedMllamaModel"}


@functools.cache
def built():
    """Every connector with its patched copy, without memory for parameters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated_layers, "open_flamingo", lambda: reference_flamingo)
        return {c.name: host.build(c, "meta") for c in host.CONNECTORS}


def test_every_patched_family_has_a_row():
    kinds = {type(module).__mro__ for _, after in built().values() for module in after.modules()}
    found = {kind.__name__ for order in kinds for kind in order}
    families = {mixin.__name__ for mixin, _ in FAMILIES}
    assert families - found == MODELS_OF_LAYERS


def test_names_are_unique():
    assert len(built()) == len(host.CONNECTORS)


def test_connector_that_is_not_patched_is_an_error():
    with pytest.raises(ValueError, match="nothing is patched"):
        host.build(Connector("linear", lambda: nn.Linear(2, 2), features(1, 2)), "cpu")


def test_row_has_times_of_both_in_inference_and_training():
    projector = Connector(
        "tiny",
        lambda: tiny_llava.llava().model.multi_modal_projector.bfloat16(),
        features(1, 5, 48),
    )
    rows = list(host.rows_of(projector, [1, 2], runs=2, device="cpu"))
    assert [(row["batch"], row["mode"]) for row in rows] == [
        (1, "inference"), (1, "training"), (2, "inference"), (2, "training"),
    ]  # fmt: skip
    for row in rows:
        assert row["before_us"] > 0 and row["ratio"] == row["after_us"] / row["before_us"]


def test_training_differentiates_what_needs_a_gradient():
    linear = nn.Linear(3, 2)
    linear.bias.requires_grad_(False)
    x = torch.randn(4, 3, requires_grad=True)
    connector = Connector("linear", lambda: linear, features(4, 3))
    gradients = host.training(connector, linear, (x,))()
    assert [g.shape for g in gradients] == [(2, 3), (4, 3)]


def test_functions_of_a_call_are_listed_by_depth():
    def outer():
        return inner()

    def inner():
        return len("")

    assert frames.functions(outer) == ["test_host.py:outer", "  test_host.py:inner"]


def test_mean_ratio_is_geometric():
    assert host.mean_ratio([{"ratio": 0.5}, {"ratio": 2.0}]) == pytest.approx(1.0)


# ---- its stage of the GPU run ----


@pytest.fixture
def tiny_projector(monkeypatch):
    """A small projector in place of the connectors of the stage."""
    projector = Connector(
        host.FEW[0], lambda: tiny_llava.llava().model.multi_modal_projector.bfloat16(),
        features(1, 5, 48),
    )  # fmt: skip
    monkeypatch.setattr(host, "CONNECTORS", (projector,))


def test_stage_measures_connectors_that_exist():
    assert set(host.FEW) <= {connector.name for connector in host.CONNECTORS}


def test_stage_adds_rows_of_three_batches(tiny_projector):
    results = {}
    assert gpu_stages.host_time(results, "cpu", float("inf")) == []
    assert {row["batch"] for row in results["host"]["rows"]} == {1, 2, 8}
    json.dumps(results, allow_nan=False)


def test_stage_that_ends_early_says_so(tiny_projector):
    results = {}
    assert gpu_stages.host_time(results, "cpu", time.monotonic() - 1) == ["out of time"]
    assert results["host"] == {"rows": [], "finished": False}


# ---- launchers of Triton kernels, of which a GPU run compares the results ----


def test_op_without_kernels_has_the_same_results_by_every_launcher():
    assert gpu_checks.launchers("cpu", ["gated_add"]) == []


def test_launcher_with_other_results_is_reported(monkeypatch):
    def step(*given):
        return [torch.tensor(float(os.environ["VLM_FAST_LAUNCHER"] == "python"))]

    monkeypatch.setattr(gpu_checks, "step", step)
    found = gpu_checks.launchers("cpu", ["gated_add"])
    assert len(found) == 3  # one for each dtype
    assert found[0] == "gated_add float32: the launcher python gives other results"


@pytest.mark.skipif(stub_gpu.why_none() is not None, reason=str(stub_gpu.why_none()))
@pytest.mark.parametrize("launcher, kind", [("c", "Launcher"), ("triton", "method")])
def test_kernels_are_launched_by_the_wanted_launcher(launcher, kind, monkeypatch):
    monkeypatch.setattr(gpu_checks, "KERNELS", {})
    with stub_gpu.active("c"):
        kernel = stub_kernels.kernel_of(stub_kernels.add_one, 16)
        gpu_checks.KERNELS["add_one"] = kernel
        with gpu_checks.launched_by(launcher):
            kernel(stub_kernels.one_program, torch.zeros(64), 64)
            assert type(kernel.launch).__name__ == kind
        assert kernel.launch == kernel.launch_by_triton
