"""Checks that an op is as accurate as plain PyTorch and touches no memory around its tensors."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tests.support.dispatch_modes import ExactSoftmaxBackward
from tests.support.guard_bands import GuardBands
from vlm_fast.verification import tolerance
from vlm_fast.verification.summation_orders import ReorderedRuns


def assert_accurate(op, args, options, *, layout="dense", upstream="dense", ignore_nonfinite=False):
    """Check outputs and gradients by the tolerance rule, and that no memory around them is touched.

    With ``ignore_nonfinite``, elements are ignored where only one of plain PyTorch and its float64
    run is finite, if ours is like one of the two. Examples are its GELU of +Inf, which is NaN in
    fp32, and intermediates that overflow in fp16. Ours may also be like plain PyTorch in another
    order of summation.
    """
    with GuardBands() as bands:
        args = tuple(bands.lay_out(value, layout, i) for i, value in enumerate(args))
        if op.returns_indices:
            verdicts = tolerance.check(op, args, options)
            assert verdicts and all(v.ok for v in verdicts), verdicts
            bands.check()
            return

        def make_upstream(result: Tensor) -> Tensor:
            grad = tolerance.random_upstream(result)
            if upstream == "scalar":
                return grad.new_full((), 0.75).expand_as(grad)
            return bands.lay_out(grad, upstream)

        names, found, others = evaluate(op, args, options, make_upstream)
    for i, (name, tensors) in enumerate(zip(names, found, strict=True)):
        verdict = verdict_on(
            name, tensors, (other[i] for other in others), ignore_nonfinite=ignore_nonfinite
        )
        assert verdict.ok, verdict
    bands.check()


def verdict_on(name, tensors, others, *, ignore_nonfinite=False):
    gradient = name.startswith("gradient")
    if not ignore_nonfinite:
        return tolerance.judge(name, *tensors, gradient=gradient, others=others)
    verdict = tolerance.judge(name, *mask_nonfinite(*tensors), gradient=gradient)
    if not verdict.ok:
        (*tensors,) = mask_nonfinite(*tensors, *others)
        verdict = tolerance.judge(name, *tensors[:3], gradient=gradient, others=tensors[3:])
    return verdict


def evaluate(op, args, options, upstream=None):
    """Run an op, plain PyTorch and float64 on the same arguments.

    Returns the names of all results and gradients; for each name the three values; and runs of
    plain PyTorch with other rounding.
    """

    def run(f, args=args):
        return tolerance.outputs_and_gradients(f, args, options, upstream=upstream)

    ours, native = run(op.fast), run(op.reference)
    with ExactSoftmaxBackward():
        exact = run(op.reference, tolerance.convert(args, Tensor.double))
    names = [
        f"{kind} {i}" for kind, part in zip(("output", "gradient"), ours, strict=True)
        for i in range(len(part))
    ]  # fmt: skip
    triples = list(zip(*([*y, *dx] for y, dx in (ours, native, exact)), strict=True))
    assert names and not any(t is None for one in triples for t in one)
    plain = [lambda f=f: list(itertools.chain(*run(f))) for f in op.references]
    return names, triples, ReorderedRuns(*plain)


def mask_nonfinite(ours, native, exact, *others):
    def kind(x):  # finite, NaN, +Inf or -Inf
        return torch.where(x.isnan(), 2, x.isposinf().int() - x.isneginf().int())

    plain = torch.stack([kind(x) for x in (native, exact.to(ours.dtype), *others)])
    differ, alike = (plain != plain[0]).any(0), (plain == kind(ours)).any(0)
    alike |= native.isnan() & ours.isinf()  # an overflow of plain PyTorch that met an Inf or a 0
    return [t.masked_fill(differ & alike, 0) for t in (ours, native, exact, *others)]
