"""The benchmark script and the GPU run, as far as they work on a CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vlm_fast.benchmarks import gpu, gpu_checks, gpu_compile, models, suite
from vlm_fast.benchmarks.gpu_stages import STAGES, Stage
from vlm_fast.benchmarks.models import photograph
from vlm_fast.benchmarks.result_rows import FAMILIES
from vlm_fast.devtools import ahead_of_time, memory, timing
from vlm_fast.kernels._triton import AVAILABLE
from vlm_fast.ops.declaration import OPS, with_batch
from vlm_fast.verification import results_files

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments):
    # On a busy machine several threads are slower than one.
    return subprocess.run(
        [sys.executable, "-m", *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = tmp_path_factory.mktemp("quick") / "results.json"
    # Other tests cover parity and torch.compile of every op; here they would take minutes.
    sections = [f"--section={name}" for name in suite.SECTIONS if name != "parity"]
    few = ("--provider=vlm_fast", "--provider=eager", "--json", str(path))
    found = python("vlm_fast.cli.main", "bench", "--quick", *sections, *few)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout, json.loads(path.read_text())


@pytest.mark.slow
def test_quick_run_measures_all_ops_and_verifies_patched_model(quick):
    _, results = quick
    assert {row["op"] for row in results["ops"]} == set(OPS)
    assert all(row["median"] > 0 and row["rounds"] >= 3 for row in results["ops"])


@pytest.mark.slow
def test_patched_models_match_unpatched(quick):
    _, results = quick
    assert results["models"].keys() == models.MODELS.keys()
    for found in results["models"].values():
        proof = found["proof"]
        assert proof["verified"] and proof["same_tokens"] and proof["repeats_bitwise"]
        assert proof["judged"]["passed"] == proof["judged"]["tensors"] > 1, proof["judged"]
        assert found["finished"]


@pytest.mark.slow
def test_rows_have_the_same_keys_and_start_with_before(quick):
    """The "before" row of each part comes first, then its other states."""
    _, results = quick
    families = list(FAMILIES)
    every = [*results["models"].values(), *(results[family] for family in families)]
    for found in every:
        assert all(row.keys() == every[0]["rows"][0].keys() for row in found["rows"])
        states = {row["part"]: [] for row in found["rows"]}
        for row in found["rows"]:
            states[row["part"]].append(row)
        for before, *others in states.values():
            assert before["state"] == "before" and before["ratio"] == 1 and others
            assert all(row["operations"] > 0 and row["first_seconds"] > 0 for row in others)
            assert all(0 <= row["transient_bytes"] <= row["peak_bytes"] for row in others)


def rows_of(found, part):
    return [row for row in found["rows"] if row["part"] == part]


@pytest.mark.slow
def test_patch_reduces_host_syncs_bytes_and_operations(quick):
    _, results = quick
    models = results["models"]
    before, after = rows_of(models["llava"], "merge, forward+backward")
    assert after["synchronisations"] == 0 < before["synchronisations"]
    connectors = {
        "llava": "projector", "blip2": "Q-Former", "idefics": "gated layer",
        "mllama": "cross-attention layer",
    }  # fmt: skip
    for name, words in connectors.items():
        before, after = rows_of(models[name], f"{words}, forward+backward")
        assert after["saved_bytes"] < before["saved_bytes"]
        assert after["operations"] < before["operations"]
        assert bool(rows_of(models[name], "a generated token")) == (name in ("idefics", "mllama"))


@pytest.mark.slow
def test_piped_output_is_plain(quick):
    text, _ = quick
    assert text.isascii() and "\x1b" not in text
    assert "verify passed" in text


@pytest.mark.slow
def test_results_contain_no_local_paths(quick):
    _, results = quick
    assert str(ROOT) not in json.dumps(results)
    assert str(Path.home()) + "/" not in json.dumps(results)


@pytest.mark.slow
def test_gpu_run_without_gpu_reports_it():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = python("vlm_fast.benchmarks.gpu")
    assert found.returncode == 3
    assert found.stderr.startswith("vlm_fast.benchmarks.gpu needs a CUDA GPU: ")


# ---- the GPU run, on a CPU ----


def test_stages_write_results_incrementally(tmp_path):
    def broken(results, device, deadline):
        written = json.loads(path.read_text())
        assert written["stages"]["first"]["status"] == "ok"
        raise RuntimeError("broken")

    def slow(results, device, deadline):
        time.sleep(60)

    path = tmp_path / "results.json"
    stages = (
        Stage("first", 9, lambda results, *_: results.update(found=1) or [], needs_cuda=False),
        Stage("breaks", 9, broken, needs_cuda=False),
        Stage("hangs", 0.1, slow, needs_cuda=False),
        Stage("cuda only", 9, slow),
    )
    gpu.run("cpu", path, stages=stages, grace=0.1)
    written = json.loads(path.read_text())
    status = {name: stage["status"] for name, stage in written["stages"].items()}
    assert status == {
        "first": "ok", "breaks": "FAILED", "hangs": "FAILED", "cuda only": "needs a GPU",
    }  # fmt: skip
    assert written["stages"]["breaks"]["failures"] == ["RuntimeError: broken"]
    assert written["stages"]["hangs"]["failures"] == ["TimeoutError: out of time"]
    assert written["found"] == 1 and written["schema"] == results_files.SCHEMA


def test_no_stage_starts_after_deadline(tmp_path):
    stages = (Stage("late", 9, lambda *_: [], needs_cuda=False),)
    results = gpu.run("cpu", tmp_path / "results.json", stages=stages, total=-1)
    assert results["stages"]["late"]["status"] == "out of time"


def test_stage_names_are_unique():
    assert len({stage.name for stage in STAGES}) == len(STAGES)


def test_each_stage_has_time():
    assert sum(stage.seconds for stage in STAGES if stage.name != "suites") <= gpu.TOTAL_SECONDS


@pytest.mark.slow
@pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed")
def test_launch_uses_precompiled_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name, forever = "gather_image_tokens", float("inf")
    count, failures = gpu_compile.compile_all("sm_90", forever, [name], workers=1)
    assert count > 0 and failures == []
    with gpu.compilations() as late:
        for launch in ahead_of_time.launches_at(OPS[name], OPS[name].test_shapes[0], torch.float16):
            ahead_of_time.build_of(launch, "sm_90").compile()
        assert late == []
        for launch in ahead_of_time.launches_at(OPS[name], OPS[name].test_shapes[0], torch.float16):
            ahead_of_time.build_of(launch, "sm_80").compile()
        assert "split_image_tokens_kernel" in late


@pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed")
def test_builds_past_deadline_are_reported():
    count, failures = gpu_compile.compile_all("sm_90", 0.0, ["gated_add"], workers=1)
    assert count == 0 and failures == ["out of time: 3 of 3 not compiled"]


def test_repeated_calls_are_bitwise_equal():
    assert gpu_checks.repeats("cpu") == []


def test_large_shapes_exceed_32_bit_offsets():
    for op in OPS.values():
        with torch.device("meta"):
            args, options = op.sample(op.large_shape, torch.bfloat16, "meta")
        cost = op.cost_of(*args, **options)
        assert max(cost.forward_bytes, cost.backward_bytes) > 2**32, op.name


def test_large_call_equals_calls_on_its_parts(monkeypatch):
    batch = 11  # no size in a usual shape equals it
    monkeypatch.setattr(gpu_checks, "BATCH", batch)
    for op in OPS.values():
        small = with_batch(op.usual_shape, batch)
        small.pop("dropout", None)  # its mask depends on the index in the batch
        if op.large_along == "features":
            small["hidden"] = 2 * batch
        monkeypatch.setattr(op, "large_shape", small)
    assert gpu_checks.large("cpu") == []
    right = OPS["mlp"].reference
    monkeypatch.setattr(
        OPS["mlp"], "fast", lambda x, *rest, **o: right(x, *rest, **o) * x.flatten()[0]
    )
    assert any(line.startswith("mlp: ") for line in gpu_checks.large("cpu"))


@pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed")
def test_launches_are_recorded_with_grid():
    for op in OPS.values():
        found = ahead_of_time.launches(op, (torch.bfloat16,))
        assert bool(found) == (op.name not in {"max_similarity", "stacked_linear"}), op.name
        for launch in found:
            for index in range(len(launch.kernel.configs)):
                assert all(isinstance(n, int) for n in launch.programs(index))


# ---- measuring ----


def test_times_are_quartiles_and_overlapping_ones_are_not_ranked():
    times = timing.Times.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (times.lower, times.median, times.upper, times.rounds) == (2.0, 3.0, 4.0, 5)
    fast = timing.Times.of([0.5, 0.6])
    assert timing.verdict(fast, times) == "faster"
    assert timing.verdict(times, fast) == "slower"
    assert timing.verdict(times, timing.Times.of([2.5, 3.5])) == "same"


def test_timed_calls_are_interleaved():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    found = timing.interleaved(calls, [()], device="cpu", seconds=0.0, rounds=(4, 9))
    assert order[2:] == list("abbaabba")  # after the warm-up
    assert found["a"].rounds == 4


def test_bytes_and_host_syncs_of_a_known_call():
    x = torch.randn(1000, requires_grad=True)
    assert memory.saved_bytes(lambda: x.exp().sin(), [x]) == 4000  # exp's result, for both
    assert memory.saved_bytes(lambda: x.exp(), [x]) == 0  # its own result
    y = torch.randn(100_000)
    assert memory.peak_bytes(lambda: y + 1, "cpu") == pytest.approx(400_000, rel=1e-3)
    assert memory.peak_bytes(lambda: (y + 1) * 2, "cpu") == pytest.approx(800_000, rel=1e-3)
    assert memory.host_syncs(lambda: (y.sum().item(), y.nonzero(), y + 1), "cpu") == 2
    assert memory.host_syncs(lambda: (y[y > 0], y[torch.tensor([1])]), "cpu") == 1


def test_photograph_is_preprocessed_for_vision_tower():
    found, source = photograph.preprocessed("blip", "BlipImageProcessorPil")
    assert found["pixel_values"].std() > 0.1 and "astronaut" in source
    assert photograph.resized(28).shape == (1, 3, 28, 28)
