"""The GPU run's checks of the Hopper GEMMs, on a CPU: correct GEMMs pass and wrong ones fail."""

import math

import pytest
import torch

from tests.support.hopper_library import matrix, python_gemms
from vlm_fast.benchmarks import gpu_hopper, gpu_stages, hopper
from vlm_fast.kernels import _hopper
from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import self_test

SHAPES = ((1, 8, 8, 16), (131, 16, 40, 24))
NEVER = math.inf


@pytest.fixture
def without_the_op(monkeypatch):
    """Skip the checks through the op, which take longest."""
    monkeypatch.setattr(gpu_hopper, "_as_an_op", lambda device, deadline: [])


def test_correct_gemms_pass(without_the_op):
    with python_gemms() as gemms:
        assert gpu_hopper.prove("cpu", NEVER, SHAPES) == []
    assert set(gemms.calls) == {"linear_gelu", "gelu_backward"}


def test_op_is_checked_with_the_gemms(monkeypatch):
    shape = dict(shape=(140, 16), hidden=24, out=8, saved="all")
    monkeypatch.setattr(OPS["mlp"], "test_shapes", [])
    monkeypatch.setattr(OPS["mlp"], "bench_shapes", {"small": shape})
    monkeypatch.setattr(self_test, "SHRUNK", 1)
    with python_gemms() as gemms:
        assert gpu_hopper._as_an_op("cpu", NEVER) == []
        assert set(gemms.calls) == {"linear_gelu", "gelu_backward"}
        right = gemms.gelu_backward

        def wrong(*arguments):
            right(*arguments)
            matrix(arguments[4], 1, 8).mul_(1.5)  # dz

        gemms.gelu_backward = wrong
        failures = gpu_hopper._as_an_op("cpu", NEVER)
    assert any(line.startswith("mlp ") for line in failures)


@pytest.mark.parametrize(
    "name, position, what",
    [("linear_gelu", 5, "h"), ("linear_gelu", 4, "z"), ("gelu_backward", 4, "dz"),
     ("gelu_backward", 5, "h"), ("gelu_backward", 6, "dbias")],
)  # fmt: skip
def test_single_wrong_element_is_found(without_the_op, name, position, what):
    with python_gemms() as gemms:
        right = getattr(gemms, name)

        def wrong(*arguments):
            right(*arguments)
            if arguments[position]:
                dtype = torch.float32 if what == "dbias" else torch.bfloat16
                matrix(arguments[position], 1, 8, dtype=dtype)[0, 5] += 0.5

        setattr(gemms, name, wrong)
        failures = gpu_hopper.prove("cpu", NEVER, SHAPES[1:])
    assert any(f"mlp {name}" in line and f" {what}: " in line for line in failures), failures


def test_nondeterministic_results_are_found(without_the_op):
    with python_gemms() as gemms:
        right, calls = gemms.linear_gelu, []

        def drifting(*arguments):
            right(*arguments)
            calls.append(1)
            matrix(arguments[5], 1, 8)[0, 0] += 2.0**-12 * len(calls)

        gemms.linear_gelu = drifting
        failures = gpu_hopper.prove("cpu", NEVER, SHAPES[1:])
    assert any("results differ from call to call" in line for line in failures)


def test_running_out_of_time_is_not_a_pass(without_the_op):
    with python_gemms():
        assert gpu_hopper.prove("cpu", -1.0, SHAPES) != []


def test_stage_without_library_gives_reason(monkeypatch):
    monkeypatch.setattr(_hopper, "why_absent", "it was not built")
    results = {}
    assert gpu_stages.hopper_gemms(results, "cpu", NEVER) == []
    assert results == {"hopper_gemms": "left out: it was not built"}
    monkeypatch.setattr(_hopper, "why_absent", None)
    gpu_stages.hopper_gemms(results, "cpu", NEVER)
    assert results == {"hopper_gemms": "left out: this is no Hopper GPU"}


def test_wrong_gemm_fails_op_verification(without_the_op, monkeypatch):
    monkeypatch.setattr(gpu_hopper, "SHAPES", SHAPES)
    monkeypatch.setattr(gpu_hopper, "why_left_out", lambda device: None)
    results = {"parity": {"mlp": {"failures": []}}}
    with python_gemms() as gemms:
        gemms.linear_gelu = lambda *arguments: None
        failures = gpu_stages.hopper_gemms(results, "cpu", NEVER)
    assert failures
    assert results["parity"]["mlp"]["failures"] == failures
    assert results["hopper_gemms"] == "FAILED"


def test_build_violations_name_registers_spills_and_missing_instructions():
    good = dict(registers=168, stack_bytes=0, spills=0, tensor_core=8, tma=2)
    assert hopper.violations("k", good) == []
    for count, value in dict(registers=169, stack_bytes=8, spills=1, tensor_core=0, tma=0).items():
        assert len(hopper.violations("k", {**good, count: value})) == 1


def test_main_without_library_exits_3_with_reason(monkeypatch, capsys):
    monkeypatch.setattr(_hopper, "why_absent", "it was not built")
    assert hopper.main() == 3
    assert "it was not built" in capsys.readouterr().err
