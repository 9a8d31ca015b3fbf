"""The command line: text and JSON output, and exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vlm_fast.cli import main
from vlm_fast.kernels import _triton
from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import results_files, self_test
from vlm_fast.verification.tolerance import Verdict

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments):
    return CliRunner().invoke(main.app, list(arguments))


def test_module_entry_point_prints_plain_text_when_piped():
    found = subprocess.run(
        [sys.executable, "-m", "vlm_fast.cli.main", "ops"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout.isascii() and "\x1b" not in found.stdout
    assert not found.stderr


def test_env_names_cause_and_remedy_of_missing_parts(monkeypatch):
    monkeypatch.setattr(_triton, "AVAILABLE", False)
    facts = {fact["name"]: fact for fact in json.loads(call("env", "--json").stdout)}
    assert facts["triton"]["value"] == "not importable"
    assert {
        "torch",
        "compiled extension",
        "Hopper GEMMs",
        "c compiler",
        "VLM_FAST_STRICT",
    } <= facts.keys()
    assert all(fact["remedy"] for fact in facts.values() if fact["cause"])
    text = call("env").stdout
    assert "triton: " in text and "remedy: " in text


def test_ops_list_shows_current_outdated_and_missing_verification(monkeypatch):
    def result(machine, sources):
        entry = {"cases": 3, "failures": [], "dtypes": ["bfloat16"]}
        return {
            "device": "cuda", "machine": machine, "sources": {"mlp": sources},
            "parity": {"mlp": entry},
        }  # fmt: skip

    now = results_files.sources(OPS["mlp"])
    results = [result("Old", {**now, "ops/mlp.py": "0"}), result("New", now)]
    monkeypatch.setattr(results_files, "read_results", lambda: results)
    rows = {row["op"]: row for row in json.loads(call("ops", "--json").stdout)}
    assert rows["mlp"]["gpu"] == ["verified on New", "verified on Old, with an older source"]
    assert rows["merge_image_tokens"]["gpu"] == ["never run on a GPU"]
    assert "bfloat16" in rows["mlp"]["dtypes"] and "float64" not in rows["mlp"]["dtypes"]


def test_op_sources_are_its_files_and_shared_files():
    assert results_files.sources(OPS["mlp"]).keys() == {
        "ops/mlp.py", "ops/rows.py", "kernels/mlp.py", "kernels/_activation.py",
        "kernels/_hopper.py", "kernels/_sum_shares.py", "kernels/_linear_activation.py",
        "kernels/_packed_weights.py", "kernels/_pipeline.py",
        *(f"csrc/{path.name}" for path in results_files.CSRC.glob("hopper_*")),
    }  # fmt: skip
    assert "csrc/hopper_gelu.h" in results_files.sources(OPS["mlp"])
    of_another = results_files.sources(OPS["cross_attention"]).keys()
    assert of_another < results_files.sources(OPS["self_attention"]).keys()


def test_broken_results_files_are_ignored(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"schema": 0}')
    (tmp_path / "list.json").write_text("[]")
    assert results_files.read_results(tmp_path) == []


def test_check_passes_on_this_machine():
    found = call("check", "gather_image_tokens", "--json")
    assert found.exit_code == 0, found.stdout
    summary = json.loads(found.stdout)["ops"]["gather_image_tokens"]
    assert summary["cases"] > 0 and len(summary["dtypes"]) == 3 and not summary["failures"]


def test_check_prints_failures_and_their_size(monkeypatch):
    wrong = Verdict("gradient 1", 0.5, 0.25, "error 0.5 above 0.25")
    monkeypatch.setattr(self_test.tolerance, "check", lambda *_, **__: [wrong])
    found = call("check", "mlp")
    assert found.exit_code == main.Exit.FAILURE
    line = next(line for line in found.stdout.splitlines() if "gradient 1" in line)
    assert line.startswith("mlp [shape=") and "float32" in line
    assert "(error 0.5, budget 0.25)" in line


def test_check_covers_calls_without_gradients(monkeypatch):
    right = OPS["mlp"].fast
    halved = lambda *a, **o: right(*a, **o) * (1.0 if torch.is_grad_enabled() else 0.5)  # noqa: E731
    monkeypatch.setattr(OPS["mlp"], "fast", halved)
    (line,) = next(self_test.run(["mlp"], device="cpu", thorough=False)).failures()
    assert "output 0 without gradients" in line


def test_check_reports_raising_case_as_failure(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(self_test.tolerance, "check", broken)
    case = next(self_test.run(["mlp"], device="cpu"))
    assert not case.ok
    assert case.failures()[0].endswith("raised RuntimeError: no such luck")


def test_check_runs_three_shapes_per_op_and_all_when_thorough():
    for op in OPS.values():
        few = [shape for _, shape in self_test.shapes(op, full=False, thorough=False)]
        every = [shape for _, shape in self_test.shapes(op, full=False)]
        assert few == [*op.test_shapes[:2], *op.test_shapes[2:][-1:]] and len(few) >= 2
        assert every[: len(op.test_shapes)] == list(op.test_shapes)
        assert len(every) == len(op.test_shapes) + len(op.bench_shapes)
    few, every = (
        self_test.count(["mlp"], device="cpu", thorough=thorough) for thorough in (False, True)
    )
    assert few == len(list(self_test.run(["mlp"], device="cpu", thorough=False))) == 9 < every


def test_named_shapes_are_reduced_on_cpu_and_full_on_gpu():
    for op in OPS.values():
        for full in (False, True):
            for _, shape in self_test.shapes(op, full=full):
                args, _ = op.sample(shape, device="meta")
                assert all(a.numel() for a in args if isinstance(a, torch.Tensor) and a.ndim == 2)


@pytest.mark.parametrize("command", [("check",), ("bench", "--op"), ("compile", "--op")])
def test_unknown_op_is_a_usage_error_listing_known_ops(command):
    found = call(*command, "nope")
    assert found.exit_code == main.Exit.USAGE
    assert "'nope' is not one of" in found.output
    assert "gather_image_tokens" in found.output.replace("\n", "")


def test_compile_without_triton_is_an_environment_error(monkeypatch):
    monkeypatch.setattr(_triton, "AVAILABLE", False)
    found = call("compile")
    assert found.exit_code == main.Exit.ENVIRONMENT
    assert "Triton is not installed" in found.output


def test_compile_lists_one_row_per_build(monkeypatch):
    if not _triton.AVAILABLE:
        pytest.skip("Triton is not installed")
    found = call("compile", "--arch", "nonsense")
    assert found.exit_code == main.Exit.USAGE and "nonsense" in found.output
    builds = call("compile", "--arch", "sm_90", "--op", "gather_image_tokens", "--json")
    assert builds.exit_code == 0, builds.output
    kernels = {row["kernel"] for row in json.loads(builds.stdout)["kernels"]}
    assert "split_image_tokens_kernel" in kernels
