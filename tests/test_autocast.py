"""Autocast: ops that contain a linear are cast like nn.Linear, the others are left alone."""

import pytest
import torch

from tests.cases import assert_right, each, every_case
from vlm_fast import parity

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
every_low_dtype = pytest.mark.parametrize("dtype", LOW.values(), ids=LOW.keys())


def run(call, args, options, *, forward=None, backward=None):
    """Result and gradients, forward and backward each under a context of its own."""
    args = parity.convert(args, lambda t: t.detach().requires_grad_())
    with forward or torch.autocast("cpu", enabled=False):
        result = call(*args, **options)
    results = each(result)
    grads = [parity.random_upstream(r) for r in results]
    with backward or torch.autocast("cpu", enabled=False):
        found = parity.gradients(results, parity.differentiable(args), grads)
    return [*(r.detach() for r in results), *found]


def results_of(op):
    return op._path.results


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@every_low_dtype
@every_case
def test_autocast_is_that_of_the_reference(op, shape, dtype, inside):
    args, options = op.sample(shape)

    def within(call):
        regions = [torch.autocast("cpu", dtype) for _ in range(2)]
        return run(call, args, options, forward=regions[0], backward=regions[1] if inside else None)

    ours, native = within(op), within(op.reference)
    assert [t.dtype for t in ours] == [t.dtype for t in native]
    assert {t.dtype for t in ours[results_of(op) :]} == {torch.float32}
    assert (ours[0].dtype == dtype) == (op.autocasts and not op.uncast)

    def named(tensors):
        # The gradient was rounded to the dtype of the region before it became fp32.
        low = [t.to(dtype) if op.autocasts and t.dtype is torch.float32 else t for t in tensors]
        return dict(enumerate(low))

    rounded = parity.convert(args, lambda t: t.to(dtype).double() if op.autocasts else t.double())
    exact = named(run(op.reference, rounded, options))
    outputs = range(results_of(op))
    assert_right(named(ours), lambda: named(within(op.reference)), exact, *outputs)


@every_low_dtype
@every_case
def test_a_disabled_region_inside_is_obeyed(op, shape, dtype):
    args, options = op.sample(shape)

    def within(*values, **settings):
        with torch.autocast("cpu", enabled=False):
            return op(*values, **settings)

    nested = run(within, args, options, forward=torch.autocast("cpu", dtype))
    for one, other in zip(nested, run(op, args, options), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@every_low_dtype
@every_case
def test_backward_under_autocast_keeps_the_dtypes_of_forward(op, shape, dtype):
    args, options = op.sample(shape)
    inside = run(op, args, options, backward=torch.autocast("cpu", dtype))
    for one, other in zip(inside, run(op, args, options), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
