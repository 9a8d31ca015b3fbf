"""``vlm-fast bench``: rows, files, comparisons and errors."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vlm_fast.benchmarks import compare_results, machine, ops, providers, suite, test_speed
from vlm_fast.benchmarks.providers.peer import Peer
from vlm_fast.cli import main
from vlm_fast.devtools import launches, memory, telemetry, timing
from vlm_fast.devtools.passes import CALLS, MODES
from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import results_files, self_test

HEAD = {"schema", "device", "machine", "date", "commit", "versions", "sources", "quick", "finished"}
CALL = {"op", "shape", "scale", "dtype", "mode", "provider", "status"}
TIMES = {
    "median",
    "lower",
    "upper",
    "rounds",
    "cold_start",
    "of_floor",
    "saved_bytes",
    "peak_bytes",
}
FEW = ("--quick", "--op", "gather_image_tokens", "--provider", "vlm_fast", "--provider", "eager")


def bench(*arguments):
    return CliRunner().invoke(main.app, ["bench", *arguments])


def complete(content):
    """Read a results file and check that it has the keys that its readers need."""
    assert content.keys() >= HEAD and content["schema"] == results_files.SCHEMA
    for found in content.get("ops", []):
        more = TIMES if found["status"] == "measured" else {"reason"}
        assert found.keys() >= CALL | more, found
    return content


@pytest.fixture
def few_rounds(monkeypatch):
    """Skip the measurement of ceilings and time as few rounds as possible."""
    monkeypatch.setattr(timing, "ceilings", lambda *_: timing.Ceilings(1e10, 1e11))
    take = timing.in_turns
    few = lambda *a, **k: take(*a, **{**k, "seconds": 0.0, "rounds": (3, 3)})  # noqa: E731
    monkeypatch.setattr(timing, "in_turns", few)


def rows_of(op, few_rounds=None, **selected):
    selection = ops.Selection([op], **selected)
    return [row for row, _ in ops.measure(selection, device="cpu", quick=True)]


# ---- rows ----


@pytest.mark.slow
def test_each_provider_has_a_measured_row_or_a_reason(few_rounds, tmp_path):
    path, table = tmp_path / "out.json", tmp_path / "out.csv"
    found = bench(
        "--quick", "--op", "gather_image_tokens", "--json", str(path), "--csv", str(table)
    )
    assert found.exit_code == 0, found.output
    content = complete(json.loads(path.read_text()))
    assert content["finished"] and not content["failures"]
    rows = {(row["mode"], row["provider"]): row for row in content["ops"]}
    wanted = {providers.OURS, providers.EAGER, *providers.COMPILED}
    assert rows.keys() == {(mode, provider) for mode in MODES for provider in wanted}
    for row in content["ops"]:
        assert row["status"] == "measured", row
        assert row["cold_start"] > 0 and row["launches"] is None
    eager = rows["forward+backward", "eager"]
    ours = rows["forward+backward", "vlm_fast"]
    assert eager["times_faster"] == eager["median"] / ours["median"]
    with table.open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows) and float(lines[0]["median"]) == content["ops"][0]["median"]


def test_raising_provider_gives_row_with_reason(few_rounds, monkeypatch):
    def make(*args, **options):
        def call(*args, **options):
            raise RuntimeError("no such kernel\nsecond line")

        return call

    broken = Peer("Broken", "gated_add", make)
    monkeypatch.setattr(providers, "PEERS", (broken,))
    rows = rows_of("gated_add", modes=["forward"], providers=["vlm_fast", "Broken"])
    assert [row["status"] for row in rows] == ["measured", "not available"]
    assert rows[1]["reason"] == "RuntimeError: no such kernel"


def test_function_left_eager_by_torch_compile_is_not_timed(few_rounds, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, mode=None: function)
    rows = rows_of("gated_add", modes=["forward"], providers=["torch.compile"])
    assert rows[0]["reason"].startswith("no graph was made")


@pytest.mark.slow
def test_counting_host_syncs_does_not_stop_dynamo(few_rounds):
    """Dynamo does not compile under a dispatch mode, so later passes would time eager code."""
    rows = rows_of("gated_add", providers=["torch.compile"])
    assert [row["status"] for row in rows] == ["measured"] * 3
    assert all(row["synchronisations"] is None for row in rows)


def test_no_compiling_when_time_runs_out(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(ops.time, "monotonic", lambda: float(next(clock)))
    pace = ops.Pace.until(100.0, steps=10)  # at 0
    assert not pace.allows_compiling(0)  # at 10, after the 10 that are allowed
    assert pace.allows_compiling(3)  # at 20, of 40
    pace.compiling_took(25.0)
    assert not pace.allows_compiling(4)  # at 30, of 50
    assert ops.Pace.until(None, steps=10).allows_compiling(0)


def test_backward_timing_excludes_forward(few_rounds):
    calls = []

    def squared(x):
        calls.append(x)
        return x.square()

    x, upstream = torch.randn(3, requires_grad=True), [torch.ones(3)]
    backward = CALLS["backward"](squared, {})
    for _ in range(3):
        torch.testing.assert_close(backward(x, upstream)[0], 2 * x)
    assert len(calls) == 1


# ---- conditions ----


class Nvml:
    """The pynvml functions that telemetry reads, for a throttled GPU without power readings."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByPciBusId(self, address):
        assert address == b"00000000:3b:00.0"
        return "gpu"

    def nvmlDeviceGetClockInfo(self, gpu, clock):
        return {1: 1980, 2: 2619}[clock]

    def nvmlDeviceGetPowerUsage(self, gpu):
        raise RuntimeError("Not Supported")

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu):
        return 700_000

    def nvmlDeviceGetTemperature(self, gpu, sensor):
        return 84

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu):
        return 0x1 | 0x40


def test_throttled_gpu_is_reported_and_missing_values_are_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    properties = types.SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with telemetry.Telemetry("cuda") as seen:
        pass
    found = seen.summary()
    assert found["throttled"] == ["hardware thermal slowdown"]  # "GPU idle" is not throttling
    assert (found["sm_mhz"], found["power_w"], found["power_limit_w"]) == (1980, None, 700)
    assert found["lacks"] == {"power_w": "RuntimeError: Not Supported"}


def test_telemetry_without_nvml_gives_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with telemetry.Telemetry("cuda") as seen:
        pass
    assert "ModuleNotFoundError" in seen.summary()["lacks"]["telemetry"]
    with telemetry.Telemetry("cpu") as seen:
        pass
    assert seen.summary()["lacks"] == {"telemetry": "no GPU is used"}


def test_cpu_rows_have_no_launches_and_have_result_sizes():
    x = torch.ones(10)
    assert launches.launches(lambda: x + 1, "cpu") is None
    assert memory.result_bytes((x, x[2:], [x + 1, None])) == 80


# ---- files ----


@pytest.mark.usefixtures("inherited_sigint")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_valid_results(few_rounds, monkeypatch, tmp_path, number):
    path, measure = tmp_path / "out.json", ops.measure

    def interrupted(*args, **options):
        for count, found in enumerate(measure(*args, **options)):
            if count == 3:
                signal.raise_signal(number)
            yield found

    monkeypatch.setattr(ops, "measure", interrupted)
    found = bench(*FEW, "--json", str(path))
    assert found.exit_code == 130, found.output
    content = complete(json.loads(path.read_text()))
    assert len(content["ops"]) == 3 and not content["finished"]
    assert content["failures"] == ["interrupted"]


def test_failing_section_does_not_stop_others(few_rounds, monkeypatch, tmp_path):
    def broken(run):
        raise RuntimeError("no such luck")

    monkeypatch.setitem(suite.SECTIONS, "op_overhead", broken)
    path = tmp_path / "out.json"
    found = bench(*FEW, "--section", "op_overhead", "--section", "ops", "--json", str(path))
    assert found.exit_code == 1 and "op_overhead: RuntimeError: no such luck" in found.output
    content = complete(json.loads(path.read_text()))
    assert content["ops"] and content["finished"]


def test_failed_parity_is_not_timed(monkeypatch, tmp_path):
    path, both = tmp_path / "out.json", ("--section", "parity", "--section", "ops")
    case = self_test.Case("gather_image_tokens", "x", "float32", raised="RuntimeError: wrong")
    monkeypatch.setattr(self_test, "run", lambda *_, **__: [case])
    found = bench(*FEW, *both, "--json", str(path))
    assert found.exit_code == 1 and "raised RuntimeError: wrong" in found.output
    assert "ops" not in complete(json.loads(path.read_text()))


def test_failed_write_keeps_old_file(tmp_path):
    path = tmp_path / "out.json"
    machine.write(path, {"schema": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        machine.write(path, {"median": math.nan})
    assert json.loads(path.read_text()) == {"schema": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


# ---- comparing ----


def row(provider, median, peak=1000, spread=0.01):
    return {
        "op": "mlp", "shape": "x", "scale": "whole", "dtype": "bfloat16", "mode": "forward",
        "provider": provider, "status": "measured", "median": median,
        "lower": median * (1 - spread), "upper": median * (1 + spread),
        "saved_bytes": 0, "peak_bytes": peak,
    }  # fmt: skip


def test_comparison_uses_time_relative_to_eager():
    old = [row("vlm_fast", 1.0), row("eager", 2.0)]
    busy = [row("vlm_fast", 3.0), row("eager", 6.0)]
    assert list(compare_results.regressions(old, busy, 0.05)) == []
    slower = [row("vlm_fast", 1.2), row("eager", 2.0)]
    assert list(compare_results.regressions(old, slower, 0.05)) == [
        "mlp, x, forward: takes 0.60 of eager's time, took 0.50"
    ]
    assert list(compare_results.regressions(old, slower, 0.25)) == []
    noisy = [row("vlm_fast", 1.2, spread=0.3), row("eager", 2.0)]
    assert list(compare_results.regressions(old, noisy, 0.05)) == []
    larger = [row("vlm_fast", 1.0, peak=1100), row("eager", 2.0)]
    assert list(compare_results.regressions(old, larger, 0.05)) == [
        "mlp, x, forward: peak_bytes 1100, were 1000"
    ]


def test_regression_gives_exit_code_1(few_rounds, monkeypatch, tmp_path):
    path = tmp_path / "old.json"
    assert bench(*FEW, "--json", str(path)).exit_code == 0
    same = bench(*FEW, "--compare", str(path), "--allow", "1000")
    assert same.exit_code == 0 and "3 rows in both" in same.output
    content = json.loads(path.read_text())
    for old in content["ops"]:
        old["peak_bytes"] //= 2
    path.write_text(json.dumps(content))
    found = bench(*FEW, "--compare", str(path), "--allow", "1000")
    assert found.exit_code == 1 and "peak_bytes" in found.output


# ---- errors, before anything is measured ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--op", "nope"), "'nope' is not one of"),
        (("--op", "mlp", "--shape", "nope"), "'LLaVA-1.5-7B, 1 image'"),
        (("--mode", "sideways"), "'forward+backward'"),
        (("--provider", "nobody"), "'xformers'"),
        (("--section", "nothing"), "'patch_mergers'"),
        (("--dtype", "int8"), "'bfloat16'"),
        (("--json", "/no/such/place/out.json"), "mkdir -p /no/such/place"),
        (("--csv", "/"), "name a file in it"),
        (("--compare", "/no/such/file.json"), "No such file"),
        (("--quick", "--save"), "not worth keeping"),
    ],
)
def test_unknown_name_is_a_usage_error_listing_valid_names(monkeypatch, arguments, words):
    monkeypatch.setattr(suite, "run", lambda *_, **__: pytest.fail("measured"))
    found = bench(*arguments)
    assert found.exit_code == main.Exit.USAGE, found.output
    assert "".join(words.split()) in "".join(found.output.split())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"), ("[]", "has schema None where 2 is read"),
        ('{"schema": 1}', "has schema 1 where 2 is read: measure it again"),
    ],
)  # fmt: skip
def test_other_schema_version_is_refused_with_remedy(tmp_path, content, words):
    path = tmp_path / "old.json"
    path.write_text(content)
    found = bench(*FEW, "--compare", str(path))
    assert found.exit_code == main.Exit.USAGE
    assert "".join(words.split()) in "".join(found.output.split())


def test_other_machine_is_not_compared(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"schema": 2, "machine": "Abacus", "ops": [row("eager", 1)]}))
    found = bench(*FEW, "--compare", str(path))
    assert found.exit_code == main.Exit.USAGE and "Abacus" in found.output


# ---- pytest-benchmark ----


def test_pytest_benchmark_times_one_case_per_op():
    assert {case[0] for case in test_speed.cases()} == OPS.keys()
    case = "test_speed[gather_image_tokens-LLaVA-1.5-7B, 8 x 2944-forward-eager]"
    path = Path(test_speed.__file__).resolve()
    # pytest-benchmark measures nothing in a worker of xdist, which it knows by its environment.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"{path}::{case}", "--benchmark-max-time=0.01"],
        cwd=path.parents[1], capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    assert "gather_image_tokens, LLaVA-1.5-7B, 8 x 2944, forward" in found.stdout
