"""Tests that need a GPU, for every op: CUDA graphs, streams, host syncs, determinism."""

import pytest
import torch

from tests.support.cases import any_case, each
from vlm_fast.verification import tolerance

pytestmark = pytest.mark.devices("cuda")


def prepared(op, shape, device):
    """A warmed-up function that runs only the op's forward and backward."""
    args, options = op.sample(shape, torch.bfloat16, device)
    args = tolerance.convert(args, lambda t: t.detach().requires_grad_())
    inputs = tolerance.differentiable(args)
    floating = lambda r: r.is_floating_point()  # noqa: E731
    upstream = [
        tolerance.random_upstream(r) if floating(r) else None
        for r in each(op.fast(*args, **options))
    ]

    def step():
        results = each(op.fast(*args, **options))
        found = tolerance.gradients(results, inputs, upstream)
        return [*(r.detach() for r in results), *(g for g in found if g is not None)]

    # CUDA graph capture needs a warm-up on a side stream.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    return step, inputs


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@any_case
def test_replayed_cuda_graph_uses_new_inputs(device, op, shape):
    step, inputs = prepared(op, shape, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in inputs:
            tensor.mul_(0.5)
    graph.replay()
    assert_equal(captured, step())


@any_case
def test_no_host_sync(device, op, shape):
    step, _ = prepared(op, shape, device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@any_case
def test_side_stream_gives_the_same_results(device, op, shape):
    step, _ = prepared(op, shape, device)
    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = step()
    stream.synchronize()
    assert_equal(found, expected)


@any_case
def test_hundred_repeats_are_bitwise_equal(device, op, shape):
    step, _ = prepared(op, shape, device)
    first = step()
    for _ in range(100):
        assert_equal(step(), first)
