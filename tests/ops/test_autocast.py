"""Autocast: ops with a linear cast like nn.Linear, the others do not cast."""

import pytest
import torch

import vlm_fast
from tests.support.cases import OPS, any_op, assert_right, each, every_case
from vlm_fast.verification import tolerance

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
every_low_dtype = pytest.mark.parametrize("dtype", LOW.values(), ids=LOW.keys())


def run(call, args, options, *, forward=None, backward=None):
    """Result and gradients, with separate contexts for forward and backward."""
    args = tolerance.convert(args, lambda t: t.detach().requires_grad_())
    with forward or torch.autocast("cpu", enabled=False):
        result = call(*args, **options)
    results = each(result)
    grads = [tolerance.random_upstream(r) for r in results]
    with backward or torch.autocast("cpu", enabled=False):
        found = tolerance.gradients(results, tolerance.differentiable(args), grads)
    return [*(r.detach() for r in results), *found]


def results_of(op):
    return op._path.results


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@every_low_dtype
@every_case
def test_autocast_matches_reference(op, shape, dtype, inside):
    args, options = op.sample(shape)

    def within(call):
        regions = [torch.autocast("cpu", dtype) for _ in range(2)]
        return run(call, args, options, forward=regions[0], backward=regions[1] if inside else None)

    ours, native = within(op), within(op.reference)
    assert [t.dtype for t in ours] == [t.dtype for t in native]
    assert {t.dtype for t in ours[results_of(op) :]} == {torch.float32}
    assert (ours[0].dtype == dtype) == (op.autocasts and not op.not_autocast)

    def named(tensors):
        # The gradient was rounded to the dtype of the region before it became fp32.
        low = [t.to(dtype) if op.autocasts and t.dtype is torch.float32 else t for t in tensors]
        return dict(enumerate(low))

    rounded = tolerance.convert(
        args, lambda t: t.to(dtype).double() if op.autocasts else t.double()
    )
    exact = named(run(op.reference, rounded, options))
    outputs = range(results_of(op))
    assert_right(named(ours), lambda: named(within(op.reference)), exact, *outputs)


@every_low_dtype
@every_case
def test_disabled_autocast_region_is_respected(op, shape, dtype):
    args, options = op.sample(shape)

    def within(*values, **settings):
        with torch.autocast("cpu", enabled=False):
            return op(*values, **settings)

    nested = run(within, args, options, forward=torch.autocast("cpu", dtype))
    for one, other in zip(nested, run(op, args, options), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@every_low_dtype
@every_case
def test_backward_under_autocast_keeps_forward_dtypes(op, shape, dtype):
    args, options = op.sample(shape)
    inside = run(op, args, options, backward=torch.autocast("cpu", dtype))
    for one, other in zip(inside, run(op, args, options), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@every_low_dtype
@pytest.mark.parametrize("given", [torch.float32, *LOW.values()], ids=str)
@any_op
def test_disabled_matches_fast_path_under_autocast(op, given, dtype):
    """Results have the same dtypes; index ops choose the same, without rounding by the cast."""
    for shape in op.test_shapes[:3]:
        args, options = op.sample(shape, given)
        with torch.autocast("cpu", dtype):
            fast = each(op.fast(*args, **options))
            with vlm_fast.disabled():
                plain = each(op(*args, **options))
            assert [t.dtype for t in plain] == [t.dtype for t in fast]
        if op.returns_indices:
            outside = op.reference(*args, **options)
            with torch.autocast("cpu", dtype):
                assert_equal(op.reference(*args, **options), outside)
            assert_equal(tuple(plain), outside)


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def of_plain(op, *args, **options):
    with vlm_fast.disabled():
        return op(*args, **options)


HOW = {
    "disabled": lambda op, x: of_plain(op, x, r=144),
    "reference": lambda op, x: op.reference(x, r=144),
    "vmap": lambda op, x: [t[0] for t in torch.vmap(lambda x: op(x, r=144))(x[None])],
    "compiled": lambda op, x: torch.compile(
        lambda x: of_plain(op, x, r=144), backend="eager", fullgraph=True
    )(x),
}


@pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning")
@every_low_dtype
@pytest.mark.parametrize("how", HOW)
def test_cosine_similarity_is_fp32_under_autocast(how, dtype):
    op = OPS["bipartite_match"]
    x = torch.randn(4, 288, 64)
    expected = op.reference(x, r=144)
    with torch.autocast("cpu", dtype):
        found = HOW[how](op, x)
    assert_equal(found, expected)
    assert all(verdict.ok for verdict in op.verify(found, x, r=144, protected=0))


@every_low_dtype
def test_fp16_rows_merge_under_bf16_autocast(dtype):
    """Plain PyTorch's scatter raises for these dtypes under autocast."""
    op = OPS["merge_image_tokens"]
    other = next(d for d in LOW.values() if d is not dtype)
    args, options = op.sample(op.test_shapes[1], other)
    with torch.autocast("cpu", dtype):
        plain = of_plain(op, *args, **options)
    assert torch.equal(plain, op(*args, **options))
