"""The fast path of every op: parity, gradients, memory bounds and determinism on each device."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor

from tests.support.cases import (
    DTYPES,
    any_case_with,
    any_op,
    each,
    every_case,
    every_case_with,
    every_op,
    two_shapes,
)
from tests.support.guard_bands import LAYOUTS, GuardBands
from tests.support.op_accuracy import assert_accurate, evaluate, verdict_on
from vlm_fast.kernels import _launcher
from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import tolerance

pytestmark = pytest.mark.devices("cpu", "interpreter", "cuda")
UPSTREAMS = ("dense", "padded rows", "transposed", "every other column", "expanded", "scalar")


@pytest.mark.aten
@any_case_with("dtype", DTYPES)
def test_parity(device, op, shape, dtype):
    assert_accurate(
        op, *op.sample(shape, dtype, device), layout="padded rows", upstream="padded rows"
    )


@pytest.mark.aten
@every_case_with("dtype", DTYPES)
def test_parity_without_gradients(device, op, shape, dtype):
    """Without gradients an op may use another kernel, because it saves nothing."""
    args, options = op.sample(shape, dtype, device)
    with GuardBands() as bands, torch.no_grad():
        args = tuple(bands.lay_out(value, "padded rows", i) for i, value in enumerate(args))
        run = lambda f, args: dict(enumerate(each(f(*args, **options))))  # noqa: E731
        ours = run(op.fast, args)
        exact = run(op.reference, tolerance.convert(args, Tensor.double))
        plain = [functools.partial(run, f, args) for f in op.references]
        verdicts = tolerance.judge_all(ours, plain[0], exact, outputs=ours, rounding=plain[1:])
    assert verdicts and all(v.ok for v in verdicts), verdicts
    bands.check()


@pytest.mark.aten
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "padded rows"])
@two_shapes
@any_op
def test_parity_for_input_layouts(device, op, number, layout):
    for shape in op.test_shapes[number : number + 1]:
        assert_accurate(op, *op.sample(shape, torch.bfloat16, device), layout=layout)


@pytest.mark.aten
@pytest.mark.parametrize("upstream", UPSTREAMS)
@two_shapes
@every_op
def test_parity_for_upstream_gradient_layouts(device, op, number, upstream):
    for shape in op.test_shapes[number : number + 1]:
        assert_accurate(op, *op.sample(shape, device=device), upstream=upstream)


HOSTILE = {
    "nan row": lambda x: x.index_fill(-2, last_row(x), torch.nan),
    "inf": lambda x: one_element(x, torch.inf),
    "minus inf": lambda x: one_element(x, -torch.inf),
    "zeros": torch.zeros_like,
    "subnormal": lambda x: x * (torch.finfo(x.dtype).smallest_normal / 8),
    "large mean": lambda x: 1000 + 1e-4 * x,
    "large spread": lambda x: 60 * x,
}


def last_row(x: Tensor) -> Tensor:
    return torch.tensor([x.shape[-2] - 1], device=x.device)


def one_element(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[(-1,) * x.ndim] = value
    return x


@any_case_with("values", HOSTILE)
def test_parity_for_extreme_values(device, op, shape, values):
    args, options = op.sample(shape, device=device)
    if args[0].numel():
        hostile = values(args[0])
        finite = bool(hostile.isfinite().all())
        assert_accurate(op, (hostile, *args[1:]), options, ignore_nonfinite=not finite)


@two_shapes
@any_op
def test_parity_under_fp16_overflow(device, op, number):
    for shape in op.test_shapes[number : number + 1]:
        args, options = op.sample(shape, torch.float16, device)
        assert_accurate(op, (args[0] * 2e4, *args[1:]), options, ignore_nonfinite=True)


def flat_needs(values, wanted):
    """Per-tensor flags whether a gradient is wanted, with lists flattened, and their number."""
    lengths = [len(v) if isinstance(v, list) else 1 for v in values]
    flat = tuple(i in wanted for i, length in enumerate(lengths) for _ in range(length))
    return flat, next((len(v) for v in values if isinstance(v, list)), 0)


def only_wanted_gradients_are_computed(device, op, shape, sizes_of):
    """Check all subsets of gradients whose sizes ``sizes_of(count)`` gives."""
    args, options = op.sample(shape, device=device)
    values = op.accepted(args, {**op.defaults, **options})
    settings = {**op.defaults, **options}
    floating = [i for i, v in enumerate(values) if tolerance.differentiable([v])]
    sizes = sorted(sizes_of(len(floating)))
    names, triples, others = evaluate(op, args, options)
    first = names.index("gradient 0")
    for wanted in (c for size in sizes for c in itertools.combinations(floating, size)):
        needs = op._path.needs_of(*flat_needs(values, wanted))
        with GuardBands() as bands, torch.no_grad():
            result, kept = op._path.forward(needs, *values, **settings)
            if not wanted:
                assert all(tensor is None for tensor in kept), "kept without need"
                continue
            results = result if isinstance(result, tuple) else (result,)
            upstream = map(tolerance.random_upstream, results)
            found = op._path.backward(needs, kept, *upstream, **settings)
        bands.check()
        at = first
        for value, gradient, needed in zip(values, found, needs, strict=True):
            for one in gradient if isinstance(gradient, list) else [gradient]:
                assert needed or one is None, "computed without need"
                if needed:
                    tensors = (one, *triples[at][1:])
                    verdict = verdict_on(names[at], tensors, (other[at] for other in others))
                    assert verdict.ok, (needs, verdict)
                    at += 1
            at += 0 if needed else len(tolerance.differentiable([value]))


@pytest.mark.aten
@every_op
def test_only_wanted_gradients_are_computed(device, op):
    """Subsets of no gradient, one, all but one, and all."""
    only_wanted_gradients_are_computed(
        device, op, op.usual_shape, lambda count: {0, 1, count - 1, count}
    )


@pytest.mark.slow
@pytest.mark.aten
@every_case
def test_other_gradient_subsets(device, op, shape):
    usual = shape is op.usual_shape
    only_wanted_gradients_are_computed(
        device, op, shape, lambda count: range(2, count - 1) if usual else {0, count}
    )


@any_op
def test_repeats_are_bitwise_equal(device, op):
    args, options = op.sample(op.usual_shape, torch.bfloat16, device)
    first, other = [tolerance.outputs_and_gradients(op.fast, args, options) for _ in range(2)]
    for tensor, again in zip(first[0] + first[1], other[0] + other[1], strict=True):
        assert torch.equal(tensor, again) if tensor is not None else again is None


@pytest.fixture
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@any_op
def test_use_deterministic_algorithms_is_obeyed(device, op, deterministic_algorithms):
    assert_accurate(op, *op.sample(op.usual_shape, device=device))


def test_each_kernel_is_launched_where_triton_runs(device):
    runs = _launcher.runs_triton(torch.empty(1, device=device))
    missing = set(_launcher.KERNELS) if runs else set()
    with _launcher.recording() as launches:
        for op in OPS.values():
            for shape in op.test_shapes:
                args, options = op.sample(shape, device=device)
                tolerance.outputs_and_gradients(op.fast, args, options)
                args, options = op.sample(shape, torch.bfloat16, device)
                with torch.no_grad():  # another kernel may be used, and in 16 bits another backward
                    op.fast(*args, **options)
                tolerance.outputs_and_gradients(op.fast, args, options)
                missing -= {launch.kernel.name for launch in launches}
                if runs and not missing:
                    return
    assert not missing and (runs or not launches)


@pytest.mark.aten
@pytest.mark.parametrize("entry", [-(2**31), -2, 10**6, 2**31 - 1])
@pytest.mark.parametrize("name", ["anyres_pack", "anyres_pack_resized", "anyres_merge"])
def test_out_of_range_tables_give_safe_addresses(device, name, entry):
    """Out-of-range entries give the newline in forward and zeros in backward."""
    op = OPS[name]
    args, options = op.sample(op.usual_shape, device=device)
    named = dict(zip(op.tensors, args, strict=True))
    forth, back = ("taps", "targets") if "taps" in named else ("source", "target")
    named[forth][::3], named[back][::3] = entry, entry
    with GuardBands() as bands, torch.no_grad():
        args = tuple(bands.lay_out(value, "dense", i) for i, value in enumerate(named.values()))
        values, settings = op.accepted(args, {**op.defaults, **options}), {**op.defaults, **options}
        needs = op.NeedsGrad(*[v is not None and v.is_floating_point() for v in values])
        result, kept = op._path.forward(needs, *values, **settings)
        gradients = op._path.backward(needs, kept, torch.ones_like(result), **settings)
    bands.check()
    torch.testing.assert_close(result, op.reference(*args, **options))
    gradients = dict(zip(op.tensors, gradients, strict=True))
    assert not gradients["features"].flatten(0, -2)[::3].any()
    newlines = named[forth].view(named[forth].shape[0], -1)[:, 0]
    rows = named["features"].flatten(0, -2).shape[0]
    count = ((newlines < 0) | (newlines >= rows)).sum()
    assert (gradients["image_newline"] == count).all()
