"""What is recorded of libraries' attention, on a CPU."""

import math

import torch

from vlm_fast.benchmarks import gpu_library_attention, ops, providers
from vlm_fast.ops.declaration import OPS


def test_each_plain_shape_has_a_row_for_each_library():
    rows = gpu_library_attention.evidence("cpu", math.inf, quick=True)
    assert [row["provider"] for row in rows] == list(gpu_library_attention.LIBRARIES)
    flash, cudnn = rows
    assert flash["failures"] == [] and flash["same_bits"]
    assert cudnn["reason"] == "has kernels for GPUs only"
    assert gpu_library_attention.evidence("cpu", -math.inf, quick=True) == []


def call():
    op = OPS["cross_attention"]
    (_, shape), *_ = ops.shapes_of(op, "cpu", quick=True)
    torch.manual_seed(0)
    return op, *op.sample(shape, torch.float32, "cpu")


def test_the_op_keeps_its_own_promises():
    op, args, options = call()
    found = gpu_library_attention.properties(op, args, options, "cpu")
    assert found == {
        "failures": [], "same_bits": True, "tokens_before_heads": True,
        "zeros_without_scores": True, "captured": False,
    }  # fmt: skip


def test_a_library_that_breaks_them_is_told_apart():
    op, args, options = call()
    exact = providers.of(op, args, options, "cpu")["SDPA"]
    calls = iter(range(1, 100))

    def wrong(*args, **options):
        return (exact(*args, **options) + 1e-2 * next(calls)).contiguous()

    found = gpu_library_attention.properties(wrong, args, options, "cpu")
    assert found["failures"] and not found["same_bits"] and not found["tokens_before_heads"]
    assert not found["zeros_without_scores"]
