"""The order in which profile points are measured, the time limit, and the Pareto front."""

import time

import pytest

from tests.support.tiny_profile import TINY, groups, setting
from tests.support.tiny_profile import tiny as tiny  # an autouse fixture
from vlm_fast.advisor import measure_points, profile_points
from vlm_fast.advisor.connectors import CONNECTORS
from vlm_fast.advisor.pareto import pareto_front


def test_pareto_front_holds_undominated_points():
    assert pareto_front([(1, 4), (2, 2), (4, 1), (3, 3), (2, 5)]) == [0, 1, 2]
    assert pareto_front([(1, 1), (1, 1)]) == [0, 1]
    assert pareto_front([(1, 2), (1, 1)]) == [1]
    assert pareto_front([]) == []


def test_default_token_counts_and_small_work_are_measured_first():
    order = groups(tokens=(5, 9, 36), batches=(1, 2), names=("mlp", "pool", "merge", "gated"))
    points = [g for g in order if isinstance(g, profile_points.PointGroup)]
    rows = [
        [(r.point.prompts, r.point.tokens in CONNECTORS[r.point.connector].token_counts(TINY))
         for r in group.rows]
        for group in points
    ]  # fmt: skip
    firsts = [row[0] for row in rows]
    assert firsts == sorted(firsts, key=lambda r: (r[0], not r[1]))
    layers = [g for g in order if isinstance(g, profile_points.LayerGroup)]
    sizes = [(g.rows[0].language.tokens, g.rows[0].point.prompts) for g in layers]
    assert len(sizes) == len(set(sizes))
    assert {(8 + n, b) for n in (0, 5, 9, 36) for b in (1, 2)} == set(sizes)


def test_saved_levels_multiply_points_only_in_training():
    levels = ("all", "input")
    count = {
        mode: sum(len(g.rows) for g in groups(mode, (36,), levels=levels, names=("mlp", "linear"))
                  if isinstance(g, profile_points.PointGroup))
        for mode in ("forward", "training")
    }  # fmt: skip
    assert count == {"forward": 2, "training": 3}


def test_unmeasured_points_report_out_of_time():
    order = groups()
    for _ in measure_points.measure_all(order, setting(deadline=time.monotonic() - 1)):
        pass
    measure_points.complete_rows(order, setting())
    for group in order:
        for row in group.rows:
            assert row.not_measured.startswith("out of time: about")
            assert row.times is None and row.seconds is None and not row.on_pareto_front
            assert row.language.basis == "modelled"
            assert row.language.seconds == row.language.flops / 1e10


def test_untimed_lengths_extrapolate_from_nearest_timed_length():
    order = groups(tokens=(36,), names=("mlp", "gated"))
    short = min((g for g in order if isinstance(g, profile_points.LayerGroup)),
                key=lambda g: g.rows[0].language.tokens)  # fmt: skip
    for _ in measure_points.measure_all([short], setting()):
        pass
    measure_points.complete_rows(order, setting())
    rows = {
        r.point.connector: r
        for g in order
        if isinstance(g, profile_points.PointGroup)
        for r in g.rows
    }
    timed, other = rows["gated"].language, rows["mlp"].language
    assert timed.basis == "measured" and timed.seconds == 2 * timed.layer.median
    assert other.basis == "extrapolated"
    assert other.seconds == pytest.approx(timed.seconds * other.flops / timed.flops)


def test_error_in_one_group_does_not_stop_others(monkeypatch):
    def broken(point):
        raise RuntimeError("no such luck\nmore")

    order = groups(names=("mlp", "linear", "pool"))
    mlp = CONNECTORS["mlp"]
    monkeypatch.setitem(CONNECTORS, "mlp", type(mlp)(**{**vars(mlp), "make_modules": broken}))
    for _ in measure_points.measure_all(order, setting()):
        pass
    rows = {
        r.point.connector: r
        for g in order
        if isinstance(g, profile_points.PointGroup)
        for r in g.rows
    }
    assert rows["mlp"].not_measured == "RuntimeError: no such luck"
    assert rows["pool"].times is not None
