"""Charts and tables in README and docs match the committed results files."""

import json

import pytest

from vlm_fast.benchmarks import (
    charts,
    report,
    report_tables,
    result_rows,
    short_run,
    support_matrix,
)
from vlm_fast.benchmarks.providers import EAGER, OURS
from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import results_files

REGENERATE = "python -m vlm_fast.benchmarks.report"


@pytest.fixture(scope="module")
def committed():
    return report.readable(results_files.read_results())


# ---- the committed pages ----


def test_pages_match_committed_results(committed):
    for path, name, content in report.contents(committed):
        text = path.read_text()
        assert report.between(text, name, content) == text, f"{path.name}, {name}: {REGENERATE}"


def test_charts_match_committed_results(committed):
    for name, chart in charts.CHARTS.items():
        path = report.CHARTS / f"{name}.svg"
        assert charts.drawn_from(path) == chart.bars(committed[0]), f"{path.name}: {REGENERATE}"


def test_tests_named_by_support_matrix_exist():
    tests = report.ROOT / "tests"
    for connector in support_matrix.CONNECTORS:
        assert set(connector.ops) <= OPS.keys()
        for test in filter(None, (connector.compiled[1], connector.sharded)):
            file, name = test.split("::")
            assert f"def {name}(" in (tests / file).read_text(), test


# ---- reports of made-up results ----


def piece(part, before, after, **more):
    row = {
        "part": part, "state": "before", "median": before, "peak_bytes": 10**6,
        "saved_bytes": 640, "launches": None,
    }  # fmt: skip
    is_faster = "slower" if after > before else "faster"
    return [row, {**row, "state": "after", "median": after, "ours_is": is_faster, **more}]


def call(provider, median, ours_is="", mode="forward", op="mlp"):
    shape = next(iter(OPS[op].bench_shapes))
    return {
        "op": op, "shape": shape, "scale": "whole", "dtype": "bfloat16", "mode": mode,
        "provider": provider, "status": "measured", "median": median, "ours_is": ours_is,
        "times_faster": median, "of_floor": 0.5,
    }  # fmt: skip


def test_best_baseline_is_fastest_with_same_results():
    rows = [
        call(OURS, 1.0), call(EAGER, 3.0, "faster"), call("torch.compile", 2.0, "faster"),
        call("flash-attn (tanh)", 0.5, "slower"),
    ]  # fmt: skip
    (found,) = result_rows.by_provider(rows).values()
    assert result_rows.best_peer(found) == "torch.compile"
    (group,) = charts.op_times({"ops": rows, "device": "cuda"})
    assert (group.heading, group.bars[0].ratio) == ("forward", 2.0)
    assert "torch.compile" in group.bars[0].words


def test_host_bound_parts_are_drawn_separately():
    launches = {"launches": 10}
    bound = piece("small", 5e-4, 8e-4)
    large = piece("large", 5e-2, 1e-2)
    for row in bound + large:
        row |= launches
    result = {"image_token_merge": {"rows": bound + large}, "device": "cuda"}
    ours, hosts = charts.piece_times(result)
    assert [bar.label for bar in ours.bars] == ["image-token merge: large"]
    assert [bar.label for bar in hosts.bars] == ["image-token merge: small"]
    assert hosts.heading.startswith("host-bound")
    assert "host-bound" in report_tables.losses(result)


def test_slower_results_are_published():
    rows = piece("x", 1.0, 1.5, peak_bytes=13 * 10**5, saved_bytes=2940)
    rows += piece("y", 1.0, 0.9)  # a difference of 2300 saved bytes is too small to be listed
    slower = {**call(EAGER, 0.8, "slower")}
    lines = report_tables.losses({"image_token_merge": {"rows": rows}, "ops": [slower]})
    assert lines.splitlines()[2:] == [
        "| image-token merge | x | 1.50 times the time |",
        "| image-token merge | x | 1.30 of the peak memory |",
        f"| mlp | {slower['shape']}, forward | 1.25 times the time of eager |",
    ]


def test_chart_holds_all_bars_and_is_deterministic(tmp_path):
    pytest.importorskip("matplotlib")
    result = {
        "machine": "Abacus", "device": "cpu",
        "image_token_merge": {"rows": piece("x", 2.0, 1.0)},
    }  # fmt: skip
    for name, chart in charts.CHARTS.items():
        if not chart.bars(result):
            continue
        paths = [tmp_path / f"{name}{i}.svg" for i in range(2)]
        for path in paths:
            charts.draw(chart, result, path)
        assert paths[0].read_bytes() == paths[1].read_bytes()
        assert charts.drawn_from(paths[0]) == chart.bars(result)


def test_quick_or_missing_results_give_no_figures(tmp_path):
    assert report.readable([{"quick": True, "models": {"x": 1}}, {"models": {}}]) == []
    contents = {name: text for _, name, text in report.contents([])}
    assert contents["figures"] == contents["measured"] == report_tables.NO_RESULTS
    assert "| no |" in contents["support"]


def test_gpu_is_listed_with_commit_and_failures():
    ops = ("mlp", "merge_image_tokens")
    parity = {"mlp": {"cases": 3, "failures": ["wrong"], "dtypes": []}}
    result = {"device": "cuda", "machine": "X", "commit": "a" * 40 + "+", "parity": parity}
    words = support_matrix.verified(ops, [result])
    assert words.startswith(f"X at {'a' * 12}+: 1 failures of mlp, merge_image_tokens never ran")
    assert "the source changed since" in words
    assert support_matrix.verified(ops, []) == "no"


def test_missing_marker_raises():
    with pytest.raises(ValueError, match="once, found 0 times"):
        report.between("nothing here", "figures", "x")


# ---- the short run ----


def test_short_run_has_one_shape_per_op():
    for name, shape in short_run.SHAPES.items():
        shapes = OPS[name].bench_shapes
        assert shape in shapes
        assert len({s for s in short_run.SHAPES.values() if s in shapes}) == 1, name


@pytest.mark.slow
def test_short_run_patches_verifies_and_times(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(short_run, "SHAPES", {"merge_tokens": short_run.SHAPES["merge_tokens"]})
    monkeypatch.setattr(short_run, "SECONDS_PER_PASS", 0.01)
    monkeypatch.setattr(short_run, "PROVIDERS", (OURS, EAGER))
    results = short_run.main("cpu", tmp_path / "out.json")
    assert results["finished"] and not results["failures"]
    assert json.loads((tmp_path / "out.json").read_text())["quick"]
    text = capsys.readouterr().out
    assert "patched model.multi_modal_projector" in text and "verify passed" in text
    assert "merge_tokens" in text and "vlm-fast bench --full" in text
    proof = results["models"]["llava"]["proof"]
    assert proof["verified"] and proof["same_tokens"]
    assert {row["op"] for row in results["ops"]} == {"merge_tokens"}
