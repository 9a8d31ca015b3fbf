"""The GPU run's checks of the Hopper GEMMs, on a CPU: they pass what is right, and nothing else."""

import math

import pytest
import torch

from tests.support.hopper_library import emulated, matrix
from vlm_fast.benchmarks import gpu_hopper, gpu_stages, hopper, machine
from vlm_fast.devtools import tuning
from vlm_fast.kernels import _configs, _hopper
from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import self_test

SHAPES = ((1, 8, 8, 16), (131, 16, 40, 24))
NEVER = math.inf


@pytest.fixture
def gemms_alone(monkeypatch):
    """Without the checks through the ops, which take longest."""
    monkeypatch.setattr(gpu_hopper, "_as_ops", lambda device, deadline: [])


def test_what_is_right_passes(gemms_alone):
    with emulated(0) as library:
        assert gpu_hopper.prove("cpu", NEVER, SHAPES) == []
    tiles = {f"{g.name}_{i}" for g in _hopper.GEMMS.values() for i in range(1, len(g.configs))}
    assert set(library.calls) == tiles


def test_ops_are_checked_with_each_config(monkeypatch):
    small = {
        "mlp": dict(shape=(140, 16), hidden=24, out=8),
        "mlp_merge": dict(
            batch=1, sequence=9, images=1, tokens=4, inner=16, middle=24, hidden=8
        ),
    }  # fmt: skip
    for name, shape in small.items():
        monkeypatch.setattr(OPS[name], "test_shapes", [])
        monkeypatch.setattr(OPS[name], "bench_shapes", {"small": {**shape, "saved": "all"}})
    monkeypatch.setattr(self_test, "SHRUNK", 1)
    with emulated(0) as library:
        assert gpu_hopper._as_ops("cpu", NEVER) == []
        assert {"gelu_backward_1", "gelu_backward_2", "linear_scatter_1"} <= set(library.calls)
        right = library._gelu_backward

        def wrong(tile, *arguments):
            right(tile, *arguments)
            matrix(arguments[4], 1, 8).mul_(1.5)  # dz

        library._gelu_backward = wrong
        failures = gpu_hopper._as_ops("cpu", NEVER)
    assert any(line.startswith("mlp ") for line in failures)
    assert any(line.startswith("mlp_merge ") for line in failures)


@pytest.mark.parametrize(
    "name, position, what",
    [("linear_gelu", 5, "h"), ("linear_gelu", 4, "z"), ("gelu_backward", 4, "dz"),
     ("gelu_backward", 5, "h"), ("gelu_backward", 6, "dbias")],
)  # fmt: skip
def test_one_wrong_number_is_found(gemms_alone, name, position, what):
    with emulated(0) as library:
        right = getattr(library, f"_{name}")

        def wrong(tile, *arguments):
            right(tile, *arguments)
            if arguments[position]:
                dtype = torch.float32 if what == "dbias" else torch.bfloat16
                matrix(arguments[position], 1, 8, dtype=dtype)[0, 5] += 0.5

        setattr(library, f"_{name}", wrong)
        failures = gpu_hopper.prove("cpu", NEVER, SHAPES[1:])
    assert any(f"mlp {name}" in line and f" {what}: " in line for line in failures), failures


@pytest.mark.parametrize("lost", [0.0, 1.0])
def test_rows_in_the_wrong_place_are_found(gemms_alone, lost):
    with emulated(0) as library:
        right = library._linear_scatter

        def wrong(tile, h, h_row, weight, bias, slots, out, out_row, rows, *rest):
            right(tile, h, h_row, weight, bias, slots, out, out_row, rows, *rest)
            matrix(out, rows + rows // 2 + 1, rest[0], out_row)[:, 3].mul_(1 + lost)

        library._linear_scatter = wrong
        failures = gpu_hopper.prove("cpu", NEVER, SHAPES[1:])
    assert bool(failures) == bool(lost)
    if lost:
        assert any("rows were written that no slot names" in line for line in failures)


def test_results_that_do_not_repeat_are_found(gemms_alone):
    with emulated(0) as library:
        right, calls = library._linear_gelu, []

        def drifting(tile, *arguments):
            right(tile, *arguments)
            calls.append(tile)
            matrix(arguments[5], 1, 8)[0, 0] += 2.0**-12 * len(calls)

        library._linear_gelu = drifting
        failures = gpu_hopper.prove("cpu", NEVER, SHAPES[1:])
    assert any("results differ from call to call" in line for line in failures)


def test_no_time_is_no_proof(gemms_alone):
    with emulated(0):
        assert gpu_hopper.prove("cpu", -1.0, SHAPES) != []


def test_without_the_library_the_stage_says_why_it_was_left_out(monkeypatch):
    monkeypatch.setattr(_hopper, "why_absent", lambda: "it was not built")
    results = {}
    assert gpu_stages.hopper_gemms(results, "cpu", NEVER) == []
    assert results == {"hopper_gemms": "left out: it was not built"}
    monkeypatch.setattr(_hopper, "why_absent", lambda: None)
    gpu_stages.hopper_gemms(results, "cpu", NEVER)
    assert results == {"hopper_gemms": "left out: this is no Hopper GPU"}


def test_a_wrong_config_fails_the_proof_of_the_op(gemms_alone, monkeypatch):
    monkeypatch.setattr(gpu_hopper, "SHAPES", SHAPES)
    monkeypatch.setattr(gpu_hopper, "why_left_out", lambda device: None)
    results = {"parity": {"mlp": {"failures": []}, "mlp_merge": {"failures": []}}}
    with emulated(0) as library:
        library._linear_gelu = lambda *arguments: None
        failures = gpu_stages.hopper_gemms(results, "cpu", NEVER)
    assert failures
    assert all(entry["failures"] == failures for entry in results["parity"].values())
    assert results["hopper_gemms"] == "FAILED"


def test_times_of_every_config_are_rows_of_a_table(monkeypatch, tmp_path):
    shape = dict(shape=(2, 70, 16), hidden=24, out=8)
    monkeypatch.setattr(OPS["mlp"], "bench_shapes", {"small": shape, "again": shape})
    monkeypatch.setattr(OPS["mlp_merge"], "bench_shapes", {})
    with emulated(0) as library:
        rows = gpu_hopper.measure("cpu", NEVER)
    assert [(row["kernel"], row["config"]) for row in rows] == [
        (name, config) for name in ("linear_gelu", "gelu_backward") for config in range(3)
    ]
    assert all(row["size"] == 140 and row["dtype"] == "bfloat16" for row in rows)
    assert all(row["lower"] <= row["median"] <= row["upper"] for row in rows)
    assert {"linear_gelu_1", "linear_gelu_2", "gelu_backward_1", "gelu_backward_2"} == set(
        library.calls
    )
    path = tmp_path / "table.json"
    machine.write(path, {"schema": _configs.SCHEMA, "kernels": tuning.selection(rows)})
    assert _configs.read(path).keys() == {"linear_gelu", "gelu_backward"}


def test_of_a_build_spills_registers_and_missing_instructions_are_named():
    good = dict(registers=168, stack_bytes=0, spills=0, tensor_core=8, tma=2)
    assert hopper.violations("k", good) == []
    for count, value in dict(registers=169, stack_bytes=8, spills=1, tensor_core=0, tma=0).items():
        assert len(hopper.violations("k", {**good, count: value})) == 1


def test_without_a_library_there_is_nothing_to_look_into(monkeypatch, capsys):
    monkeypatch.setattr(_hopper, "why_absent", lambda: "it was not built")
    assert hopper.main() == 3
    assert "it was not built" in capsys.readouterr().err
