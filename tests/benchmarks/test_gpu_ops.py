"""The order in which the GPU run times the ops."""

import math
import time

from vlm_fast.benchmarks import gpu_ops, ops, providers
from vlm_fast.ops.declaration import OPS


def test_each_op_is_timed_once_before_any_second_shape():
    first, rest, both, slow = gpu_ops.sweeps("cuda", quick=False)
    assert [op.name for op, _, _ in first.shapes] == list(OPS)
    assert first.modes == rest.modes == gpu_ops.PASSES and first.required and rest.required
    every = {(op.name, label) for op in OPS.values() for label in op.bench_shapes}
    assert {(op.name, label) for op, label, _ in (*first.shapes, *rest.shapes)} == every
    assert len(both.shapes) == len(every) and both.modes == ("forward+backward",)
    assert slow.shapes == first.shapes and slow.modes == ops.MODES
    assert not both.required and not slow.required


def test_what_compiles_is_timed_last_beside_ours():
    first, _, _, slow = gpu_ops.sweeps("cuda", quick=False)
    assert providers.OURS in first.kept and providers.OURS not in slow.kept
    assert slow.providers[0] == providers.OURS
    assert {*providers.COMPILED, "FlexAttention"} == set(slow.kept)
    assert set(first.kept) | set(slow.kept) == set(providers.NAMES)


def test_each_op_is_timed_on_a_cpu(monkeypatch):
    measured = []

    def rows(case, pace, step, *, thorough):
        for mode in case.selection.modes:
            for name in case.selection.providers:
                measured.append((case.op.name, mode, name, thorough))
                yield {"op": case.op.name, "mode": mode, "provider": name}, []

    monkeypatch.setattr(ops.Case, "rows", rows)
    found = []
    assert gpu_ops.measure("cpu", math.inf, found, quick=True) == []
    keys = [(row["op"], row["mode"], row["provider"]) for row in found]
    assert len(keys) == len(set(keys))
    for op in OPS:
        for mode in ops.MODES:
            assert (op, mode, providers.OURS) in keys and (op, mode, "torch.compile") in keys
    counted = [key[:3] for key in measured if key[3]]  # launches, once an op and pass
    assert len([key for key in counted if key[2] == providers.EAGER]) == 2 * len(OPS)


def test_shapes_left_when_time_is_over_are_a_failure(monkeypatch):
    monkeypatch.setattr(ops.Case, "rows", lambda case, pace, step, *, thorough: ())
    late = time.monotonic() - 1
    assert gpu_ops.measure("cpu", late, [], quick=True) == [
        f"out of time: {len(OPS)} shapes not timed"
    ]


def test_attention_of_more_than_one_layer_has_a_library_beside_it():
    for op in ("cross_attention", "media_cross_attention", "self_attention", "qformer_layer"):
        assert [peer.name for peer in providers.PEERS if peer.op == op and "SDPA" in peer.name]
