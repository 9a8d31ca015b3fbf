"""The tolerance rule: wrong results fail on any processor, and rounding passes."""

import contextlib
import copy

import pytest
import torch

from tests.support import whole_models
from tests.support.cases import DTYPES, every_case, every_op
from tests.support.selection import slow_except
from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import tolerance
from vlm_fast.verification.summation_orders import RandomSumOrder

FP32, BF16 = torch.float32, torch.bfloat16


def terms(seed, count=4096, dtype=FP32):
    """Two rows whose dot product nearly cancels, like the gradient of a gate."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, count, generator=generator).double()
    return a.to(dtype), (b - (a @ b) / (a @ a) * a).to(dtype)


def gate(a, b, order=None):
    """The gradient of a gate: a sum of products in the given order."""
    order = torch.arange(len(a)) if order is None else order
    return {"gradient": (a[order] * b[order]).sum()}


def judged_gate(found, a, b):
    """Verdicts with several summation orders, and with a single run of plain PyTorch."""
    exact = gate(a.double(), b.double())
    (several,) = tolerance.judge_all(found, lambda: gate(a, b), exact, outputs=())
    triple = found["gradient"], gate(a, b)["gradient"], exact["gradient"]
    return several, tolerance.judge("gradient", *triple, gradient=True)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_cancelling_sums_pass_in_any_order(dtype):
    unlucky = 0
    for seed in range(100):
        a, b = terms(seed, dtype=dtype)
        order = torch.randperm(len(a), generator=torch.Generator().manual_seed(1000 + seed))
        several, single = judged_gate(gate(a, b, order), a, b)
        assert several.ok, several
        unlucky += not single.ok
    assert unlucky or dtype is BF16  # otherwise the other orders would not be needed


def test_missing_term_of_a_cancelling_sum_fails():
    for seed in range(100):
        a, b = terms(seed)
        some = torch.arange(len(a)) != (a * b).abs().argsort()[len(a) // 2]  # a term of median size
        several, _ = judged_gate(gate(a[some], b[some]), a, b)
        assert not several.ok


def product(a, b):
    a = a.detach().requires_grad_()
    y = a @ b
    (da,) = torch.autograd.grad(y, a, tolerance.random_upstream(y))
    return {"y": y.detach(), "a": da}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_four_times_the_error_fails(dtype):
    a, b, c = torch.randn(65, 300), torch.randn(300, 300) / 16, torch.randn(300, 80)
    b, c = b + torch.randn(300, 1), c - c.mean(0)  # each sum nearly cancels
    a, b, c = a.to(dtype), b.to(dtype), c.to(dtype)
    exact = a.double() @ b.double() @ c.double()
    run = lambda: dict.fromkeys(("output", "gradient"), a @ b @ c)  # noqa: E731
    for times, right in ((1, True), (4, False)):
        found = (exact + times * ((a @ b @ c).double() - exact)).to(dtype)
        both = [{"output": t, "gradient": t} for t in (found, exact)]
        verdicts = tolerance.judge_all(both[0], run, both[1], outputs=["output"])
        assert [v.ok for v in verdicts] == [right, right], verdicts


def test_operands_of_lower_precision_fail():
    a, b = torch.randn(5, 300), torch.randn(300, 8)
    exact = product(a.double(), b.double())
    rounded = [(t.view(torch.int32) & -(1 << 10)).view(FP32) for t in (a, b)]
    verdicts = tolerance.judge_all(product(*rounded), lambda: product(a, b), exact, outputs=["y"])
    assert not any(v.ok for v in verdicts), verdicts


@pytest.mark.parametrize("dtype", slow_except([FP32], DTYPES.values()), ids=DTYPES)
@every_op
def test_relative_error_of_a_thousandth_fails(op, dtype):
    """Every result is scaled by 1.001, or by 1.05 in 16-bit dtypes, whose ulp is larger."""
    args, options = op.sample(op.usual_shape, dtype)
    factor = 1.001 if dtype is FP32 else 1.05
    wrong = lambda *args, **options: _scaled(op.fast(*args, **options), factor)  # noqa: E731
    verdicts = tolerance.check(op, args, options, fast=wrong)
    assert not any(v.ok for v in verdicts if v.what.startswith("output")), verdicts


def _scaled(result, factor):
    if isinstance(result, tuple):
        return tuple(_scaled(r, factor) for r in result)
    return result * factor if result.is_floating_point() else result


@pytest.mark.parametrize("factor", [1, 1.001])
def test_gate_gradient_off_by_a_thousandth_fails_in_whole_model(factor, monkeypatch):
    plain, fast, given = whole_models.pair("idefics")
    wide = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    true = copy.deepcopy(plain).double()
    true.set_attn_implementation("sdpa")  # eager attention computes softmax in fp32
    for name in ("gated_add", "gated_add_norm"):
        monkeypatch.setattr(OPS[name]._path, "backward", _gate_times(factor, OPS[name]))
    ours, exact = whole_models.step(fast, given), whole_models.step(true, wide)
    step = lambda: whole_models.step(plain, given)  # noqa: E731
    verdicts = tolerance.judge_all(ours, step, exact, outputs=("logits", "loss"))
    wrong = [v.what for v in verdicts if not v.ok]
    assert len(wrong) == (0 if factor == 1 else 4) and all("alpha" in name for name in wrong)


def _gate_times(factor, op):
    at, right = op.tensors.index("gate"), op._path.backward

    def backward(*args, **options):
        gradients = list(right(*args, **options))
        gradients[at] = gradients[at] * factor
        return tuple(gradients)

    return backward


# ---- alternative references ----


@every_case
def test_alternative_references_agree_up_to_rounding(op, shape):
    """In float64 a reference that pairs wrong factors differs by far more than rounding."""
    args, options = op.sample(shape)
    wide = tolerance.convert(args, torch.Tensor.double)
    for plain in op.references:
        found = []
        for order in (contextlib.nullcontext(), RandomSumOrder(3)):
            with order:
                found.append(tolerance.outputs_and_gradients(plain, wide, options))
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)
