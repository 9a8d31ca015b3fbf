"""The model of device time: its error is what it says, and its parts are what they say."""

import dataclasses
import json
import statistics
import sys

import pytest
import torch
from typer.testing import CliRunner

from tests.support.cases import OPS
from vlm_fast.cli import main
from vlm_fast.devtools.device_time import calibration, causes, count_measured, measured_rows
from vlm_fast.devtools.device_time.counts import KernelCounts
from vlm_fast.devtools.device_time.model import BOUNDS, Table, microseconds
from vlm_fast.devtools.device_time.occupancy import occupancy
from vlm_fast.devtools.device_time.pass_kernels import AtenKernel, bytes_of
from vlm_fast.verification import results_files

CONSTANTS = calibration.read_calibration()["constants"]
IDLE = KernelCounts("k", 132, 4, 8, 0, 0, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def rows():
    return measured_rows.read_rows()


def test_constants_and_errors_are_those_of_the_results_file():
    pytest.importorskip("scipy")
    found, shipped = calibration.calibrate(), calibration.read_calibration()
    assert found["constants"] == pytest.approx(shipped["constants"], rel=0.02)
    for provider, error in found["left_out_error"].items():
        kept = shipped["left_out_error"][provider]
        assert (error["rows"], error["median"]) == (
            kept["rows"],
            pytest.approx(kept["median"], abs=0.01),
        )
    assert found["left_out_error"]["vlm_fast"]["median"] <= 0.30


def test_predictions_of_measured_passes_are_within_the_stated_error(rows):
    own = [row for row in rows if row.provider == "vlm_fast"]
    stated = calibration.read_calibration()["left_out_error"]["vlm_fast"]
    errors = sorted(calibration.errors(own, CONSTANTS))
    assert statistics.median(errors) <= stated["median"]
    assert errors[int(0.9 * len(errors))] <= stated["ninetieth_percentile"]


@pytest.mark.parametrize(
    "name, factor",
    [("bandwidth", 0.5), ("launch", 3), ("instruction_cycles", 2), ("step_cycles", 4)],
)
def test_a_wrong_constant_makes_the_error_larger(rows, name, factor):
    own = [row for row in rows if row.provider in ("vlm_fast", measured_rows.CONFIG)]
    wrong = {**CONSTANTS, name: CONSTANTS[name] * factor}
    right = statistics.median(calibration.errors(own, CONSTANTS))
    assert statistics.median(calibration.errors(own, wrong)) > 1.2 * right


def test_a_fit_finds_the_constants_that_made_the_times(rows):
    pytest.importorskip("scipy")
    some = rows[::3]
    table = Table.of([row.counts for row in some], [row.unseen for row in some])
    made = microseconds(table, CONSTANTS).tolist()
    exact = [dataclasses.replace(row, measured=t) for row, t in zip(some, made, strict=True)]
    assert max(calibration.errors(exact, calibration.fit(exact))) < 0.05


def test_an_op_is_left_out_with_the_kernels_that_it_launches(rows, monkeypatch):
    fitted = []
    monkeypatch.setattr(calibration, "fit", lambda rows, start: fitted.append(rows) or CONSTANTS)
    few = [row for row in rows if row.op in ("merge_image_tokens", "anyres_merge")]
    found = calibration.left_out(few, CONSTANTS)
    assert set(found) == {"merge_image_tokens", "anyres_merge"}
    for others, op in zip(fitted, found, strict=True):
        assert all(row.op != op and row.mode != "merge_image_tokens_kernel" for row in others)


def test_counts_of_another_run_are_refused(tmp_path):
    content = json.loads(measured_rows.COUNTS.read_text())
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({**content, "commit": "other"}))
    with pytest.raises(ValueError, match="run count_measured and calibration"):
        measured_rows.read_rows(path)


def test_passes_that_measured_the_host_are_left_out():
    many = measured_rows.Row(
        "op", "s", "eager", "forward", (AtenKernel("aten.add", 8),) * 30, 0, 9.0
    )
    waits = dataclasses.replace(many, counts=(AtenKernel("aten.masked_scatter", 8),))
    few = dataclasses.replace(many, counts=many.counts[:3])
    assert [measured_rows.measures_the_host(row) for row in (many, waits, few)] == [
        True,
        True,
        False,
    ]


def predict(*kernels):
    return microseconds(Table.of([kernels]), CONSTANTS).item()


def test_a_pass_is_its_first_launch_and_its_kernels():
    c = CONSTANTS
    idle = c["launch"] + c["program"]
    assert predict(IDLE) == pytest.approx(c["first"] + idle)
    assert predict(IDLE, IDLE) == pytest.approx(c["first"] + 2 * idle)
    copy = dataclasses.replace(IDLE, bytes=10**9)
    assert predict(copy) == pytest.approx(c["first"] + c["launch"] + 1e3 / c["bandwidth"], rel=1e-3)
    add = AtenKernel("aten.add", 10**9)
    expected = c["first"] + c["aten_launch"] + 1e3 / c["elementwise_bandwidth"]
    assert predict(add) == pytest.approx(expected)
    two = Table.of([[IDLE], [IDLE]], unseen=[0, 3])
    one, more = microseconds(two, c).tolist()
    assert more - one == pytest.approx(3 * c["aten_launch"])


def test_more_work_takes_longer_and_unaligned_products_longest():
    busy = dataclasses.replace(IDLE, programs=5000, instructions=1000, steps=10)
    for name in (
        "programs",
        "instructions",
        "steps",
        "shared",
        "wide_flops",
        "narrow_flops",
        "bytes",
    ):
        more = dataclasses.replace(busy, **{name: getattr(busy, name) + 10**7})
        assert predict(more) > predict(busy), name
    assert predict(dataclasses.replace(busy, blocks=2)) > predict(busy)
    square, odd = (AtenKernel("aten.mm", 10**6, (1, 4096, n, 4096)) for n in (4096, 4097))
    flops = 2 * 4096**3
    rate = flops / (predict(square) - CONSTANTS["first"] - CONSTANTS["aten_launch"]) / 1e6
    assert 600 < rate <= 800  # TFLOP/s
    assert predict(odd) > 2 * predict(square)


@pytest.mark.parametrize(
    "changes, cause",
    [
        ({}, "launch"),
        (dict(bytes=10**9), "memory"),
        (dict(wide_flops=10**9), "products"),
        (dict(shared=10**7), "shared memory"),
        (dict(steps=1000), "occupancy"),
        (dict(instructions=10**5, warps=8, programs=132 * 80), "instruction issue"),
        (dict(instructions=10**5, programs=132 * 8 + 1, warps=1), "waves"),
    ],
)
def test_causes_add_up_to_the_prediction(changes, cause):
    kernel = dataclasses.replace(IDLE, **changes)
    found = {}
    for name, _, time in causes.time_by_cause([kernel], CONSTANTS):
        found[name] = found.get(name, 0.0) + time
    assert sum(found.values()) == pytest.approx(predict(kernel))
    assert cause in found and (cause == "waves" or max(found, key=found.get) == cause)


@pytest.mark.parametrize(
    "registers, shared, warps, grid, blocks, share, limit",
    [
        # As NVIDIA's occupancy calculator gives it for compute capability 9.0.
        (16, 0, 8, 132 * 8, 8, 1.0, "warps"),
        (64, 0, 4, 132 * 12, 8, 0.5, "registers"),
        (255, 0, 8, 1, 1, 0.125, "registers"),
        (33, 0, 8, 132, 6, 0.75, "registers"),  # in units of 256 a warp
        (16, 0, 1, 132, 32, 0.5, "blocks"),
        (64, 73728, 4, 264, 3, 0.1875, "shared memory"),
    ],
)
def test_occupancy_is_that_of_the_calculator(registers, shared, warps, grid, blocks, share, limit):
    found = occupancy("sm_90", registers, shared, warps)
    assert (found.blocks, found.share, found.limit) == (blocks, share, limit)


def test_a_block_that_does_not_fit_and_an_unknown_gpu():
    with pytest.raises(ValueError, match="shared memory: no block"):
        occupancy("sm_90", 32, 228 * 1024, 4)
    with pytest.raises(KeyError):
        occupancy("sm_75", 32, 0, 4)


def test_bytes_count_once_and_no_more_than_the_storage():
    x = torch.empty(4, 8)
    assert bytes_of([x]) == 128 == bytes_of([x, x, None, 3, [x]])
    assert bytes_of([x[:2], x[2:]]) == 128 == bytes_of([x, x[1:]])
    assert bytes_of([torch.empty(1).expand(1000)]) == 4


def test_counts_are_written_as_they_are_read():
    for kernel in (IDLE, AtenKernel("aten.mm", 8, (1, 2, 3, 4)), AtenKernel("aten.add", 8)):
        assert measured_rows.as_counts(count_measured.values(kernel)) == kernel


def test_every_constant_has_a_value_within_its_bounds():
    assert set(CONSTANTS) == set(BOUNDS)
    for name, (_, least, largest) in BOUNDS.items():
        assert 0.99 * least <= CONSTANTS[name] <= 1.01 * largest, name


def call(*arguments):
    return CliRunner().invoke(main.app, ["compile", "--report", *arguments])


def test_the_report_has_every_pass_and_its_error():
    pytest.importorskip("triton")
    found = call("--op", "gated_add", "--json")
    assert found.exit_code == 0, found.output
    content = json.loads(found.stdout)
    passes = {(row["shape"], row["mode"]) for row in content["passes"]}
    assert len(passes) == len(content["passes"]) == 6
    assert content["left_out_error"]["median"] <= 0.30
    for row in content["passes"]:
        assert row["measured"] > 0 and row["peer_measured"] > 0 and row["floor"] < row["predicted"]
        assert sum(row["causes"].values()) == pytest.approx(row["predicted"])
    lost = [row["predicted"] - row["floor"] for row in content["passes"]]
    assert lost == sorted(lost, reverse=True)
    text = call("--op", "gated_add").stdout
    assert "gated_add_backward_kernel" in text and "not measured" in text
    assert "Not counted" not in text and "max_similarity." in call("--op", "max_similarity").stdout


@pytest.mark.parametrize("arguments", [("--arch", "sm_80"), ("--check",)])
def test_a_report_is_of_one_gpu_and_checks_nothing(arguments):
    pytest.importorskip("triton")
    found = call(*arguments)
    assert found.exit_code == main.Exit.USAGE and "--report is of sm_90 alone" in found.output


def results_of_one_op(sources):
    modes = ("forward", "backward")
    rows = [
        dict(op="gated_add", shape=shape, provider=provider, mode=mode, status="measured",
             median=1e-5, launches=9, dtype="bfloat16")
        for shape in OPS["gated_add"].bench_shapes
        for provider in ("vlm_fast", "eager")
        for mode in modes
    ]  # fmt: skip
    return dict(ops=rows, sources=sources, commit="new", capability="sm_90")


@pytest.mark.parametrize("current", [True, False])
def test_a_new_results_file_is_counted_where_the_source_is_the_measured_one(
    monkeypatch, tmp_path, current
):
    pytest.importorskip("triton")
    sources = results_files.sources(OPS["gated_add"]) if current else {"another": "file"}
    content = results_of_one_op({"gated_add": sources})
    (tmp_path / "GPU.json").write_text(json.dumps(content))
    counts = tmp_path / "counts.json"
    monkeypatch.setattr(results_files, "RESULTS", tmp_path)
    monkeypatch.setattr(count_measured, "COUNTS", counts)
    monkeypatch.setattr(sys, "argv", ["count_measured", "GPU"])
    count_measured.main()
    found = measured_rows.read_rows(counts)
    assert {row.op for row in found} == ({"gated_add"} if current else set())
    assert len(found) == (12 if current else 0)
    for row in found:
        assert row.measured == pytest.approx(10.0) and row.unseen == 9 - len(row.counts)
        assert (row.provider == "vlm_fast") == isinstance(row.counts[0], KernelCounts)
