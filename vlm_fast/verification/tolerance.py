"""Decide whether a result is right, relative to the error of plain PyTorch in the same dtype.

``exact`` is the reference in float64 on the same (already rounded) inputs, ``native`` the reference
in the working dtype, ``actual`` our result. See `judge` for the rule.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_fast.ops.declaration import Op
from vlm_fast.ops.verdict import ULPS as ULPS
from vlm_fast.ops.verdict import Verdict as Verdict
from vlm_fast.verification.summation_orders import ReorderedRuns

Results = dict[str, Tensor | None]

RMS_ELEMENTS = 4096


def judge(
    what: str,
    actual: Tensor,
    native: Tensor,
    exact: Tensor,
    *,
    gradient: bool = False,
    others: Iterable[Tensor] = (),
) -> Verdict:
    """Judge one tensor.

    1. Shape, dtype and device are those of ``native``.

    2. NaN and infinities are at the places where ``exact``, cast to the dtype, has them, except for
    values within the budget of the overflow threshold.

    3. ``max|actual - exact| <= max(k max|native - exact|, floor)`` with k = 2, or 3 for gradients.
    The floor is 1 ulp of ``max|exact|``, or 8 ulp for float32.

    4. Above 4096 elements also ``rms(actual - exact) <= 1.5 rms(native - exact)``, or a quarter of
    the floor, because ``native`` may be exact.

    Args:
        what: name of the tensor, for messages.
        actual: our result.
        native: of plain PyTorch in the working dtype.
        exact: of plain PyTorch in float64.
        gradient: whether it is a gradient.
        others: further results of plain PyTorch that round differently, such as those of
            `summation_orders`. The error of plain PyTorch in 3 and 4 is then the largest of all.
            They are computed one at a time and only while the verdict is a failure, since more of
            them can only raise a budget.
    """
    plain = [native]
    verdict = _judge(what, actual, plain, exact, gradient)
    for other in () if verdict.ok else others:
        plain.append(other)
        verdict = _judge(what, actual, plain, exact, gradient)
        if verdict.ok:
            break
    return verdict


def _judge(
    what: str, actual: Tensor, plain: Sequence[Tensor], exact: Tensor, gradient: bool
) -> Verdict:
    native = plain[0]

    def verdict(failure: str | None, error: float = math.nan, budget: float = math.nan) -> Verdict:
        return Verdict(what, error, budget, failure)

    for name in ("shape", "dtype", "device"):
        if getattr(actual, name) != getattr(native, name):
            return verdict(f"{name} {getattr(actual, name)}, not {getattr(native, name)}")
    if actual.numel() == 0:
        return verdict(None, 0.0, 0.0)
    # Compare on the device of the result: copying from a GPU would take longer than the rest.
    ours, true, *theirs = (
        t.detach().to(actual.device, torch.float64) for t in (actual, exact, *plain)
    )
    cast = true.to(actual.dtype).to(torch.float64)
    # Nearly always everything is finite; then nothing is masked, which would take most of the time.
    all_finite = all(bool(t.isfinite().all()) for t in (ours, cast, *theirs))
    in_native, in_both, in_all = _finite_places(ours, cast, theirs) if not all_finite else [...] * 3
    representable = true[... if all_finite else cast.isfinite()]
    size = representable.abs().max().item() if representable.numel() else 0.0
    floor = ULPS[actual.dtype] * torch.finfo(actual.dtype).eps * size
    errors = [(one - true)[in_native] for one in theirs]
    if not errors[0].numel():
        return verdict(_misplaced(ours, cast), 0.0, 0.0)
    allowed = (3 if gradient else 2) * max(e.abs().max().item() for e in errors)
    budget = max(allowed, floor)
    if not all_finite:
        near_overflow = true.abs() + budget >= torch.finfo(actual.dtype).max
        misplaced = _misplaced(ours[~near_overflow], cast[~near_overflow])
        if misplaced:
            return verdict(misplaced, math.inf, budget)
    difference = (ours - true)[in_both]
    error = difference.abs().max().item() if difference.numel() else 0.0
    if error > budget:
        return verdict(f"error {error:.3g} above {budget:.3g}", error, budget)
    if actual.numel() > RMS_ELEMENTS:
        ours_rms = _rms((ours - true)[in_all])
        native_rms = max(_rms((one - true)[in_all]) for one in theirs)
        if ours_rms > max(1.5 * native_rms, floor / 4):
            return verdict(f"rms error {ours_rms:.3g} against {native_rms:.3g}", error, budget)
    return verdict(None, error, budget)


def judge_all(
    ours: Results,
    plain: Callable[[], Results],
    exact: Results,
    *,
    outputs: Collection[str],
    rounding: Sequence[Callable[[], Results]] = (),
) -> list[Verdict]:
    """Judge named results: those in ``outputs`` as outputs, the others as gradients.

    Args:
        ours: our results; None stands for a gradient that does not exist.
        plain: computes the results of plain PyTorch in the working dtype.
        exact: of plain PyTorch in float64.
        outputs: names of outputs.
        rounding: functions that compute the same by formulas that round differently. If a tensor
            fails, all functions are run again with their sums in other orders, at most
            `summation_orders.ORDERS` times each for all tensors together.
    """
    native = plain()
    draws = ReorderedRuns(plain, *rounding)
    verdicts = []
    for name, tensor in ours.items():
        theirs, true = native[name], exact[name]
        if tensor is None or theirs is None or true is None:
            same = (tensor is None) == (theirs is None)
            failure = None if same else "a gradient is missing on one side"
            verdicts.append(Verdict(name, 0.0, 0.0, failure))
        else:
            others = (t for draw in draws if (t := draw[name]) is not None)
            gradient = name not in outputs
            verdicts.append(judge(name, tensor, theirs, true, gradient=gradient, others=others))
    return verdicts


def _finite_places(ours: Tensor, cast: Tensor, theirs: Sequence[Tensor]) -> list[Any]:
    """Masks of the places where exact and plain, exact and ours, and all of them are finite."""
    in_native = cast.isfinite()
    for one in theirs:
        in_native = in_native & one.isfinite()
    in_both = ours.isfinite() & cast.isfinite()
    return [in_native, in_both, in_both & in_native]


def _misplaced(ours: Tensor, cast: Tensor) -> str | None:
    for name, at in {"NaN": torch.isnan, "+Inf": torch.isposinf, "-Inf": torch.isneginf}.items():
        if not torch.equal(at(ours), at(cast)):
            return f"{name} in other places ({at(ours).sum()} against {at(cast).sum()})"
    return None


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item() if error.numel() else 0.0


def differentiable(args: Sequence[Any]) -> list[Tensor]:
    """The floating tensors among the arguments, including those in lists."""
    flat = [t for a in args for t in (a if isinstance(a, list) else [a])]
    return [t for t in flat if isinstance(t, Tensor) and t.is_floating_point()]


def convert(args: Sequence[Any], change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """The arguments with ``change`` applied to each floating tensor."""

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(v) for v in value]
        if isinstance(value, Tensor) and value.is_floating_point():
            return change(value)
        return value

    return tuple(one(a) for a in args)


def outputs_and_gradients(
    function: Callable[..., Any],
    args: Sequence[Any],
    options: Mapping[str, Any],
    *,
    upstream: Callable[[Tensor], Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Results of a function, and gradients of every floating argument.

    Args:
        function: an op or its reference.
        args: positional arguments.
        options: keyword arguments.
        upstream: makes the upstream gradient of a result; by default `random_upstream`.
    """
    args = convert(args, lambda t: t.detach().requires_grad_())
    result = function(*args, **options)
    results = list(result) if isinstance(result, tuple) else [result]
    make = upstream or random_upstream
    grads = [make(r) if r.is_floating_point() else None for r in results]
    found = gradients(results, differentiable(args), grads)
    return [r.detach() for r in results], found


def gradients(
    results: Sequence[Tensor], inputs: Sequence[Tensor], upstream: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """``torch.autograd.grad`` of the results that require gradients; None for unused inputs."""
    pairs = [(r, g) for r, g in zip(results, upstream, strict=True) if r.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    taken, grads = zip(*pairs, strict=True)
    return list(torch.autograd.grad(taken, inputs, grads, allow_unused=True))


def random_upstream(result: Tensor) -> Tensor:
    """A fixed random upstream gradient, the same for every dtype: its values are exact in bf16."""
    device = result.device if result.is_cuda else torch.device("cpu")
    generator = torch.Generator(device).manual_seed(1)
    grad = torch.randn(result.shape, generator=generator, device=device).bfloat16()
    return grad.to(result.device, result.dtype)


def check(
    op: Op[..., Any],
    args: Sequence[Any],
    options: Mapping[str, Any],
    *,
    fast: Callable[..., Any] | None = None,
    upstream: Callable[[Tensor], Tensor] | None = None,
    inference: bool = False,
) -> list[Verdict]:
    """Judge every output and gradient of one call against the op's reference.

    Args:
        op: the op.
        args: in the working dtype, on the device under test.
        options: keyword arguments.
        fast: replaces ``op.fast``.
        upstream: makes the upstream gradient of a result; by default `random_upstream`.
        inference: also judge the outputs of a call without gradients, because some ops launch other
            kernels then.
    """
    if op.verify is not None:
        found = (fast or op.fast)(*args, **options)
        return op.verify(found, *args, **{**op.defaults, **options})
    without = " without gradients"

    def run(f: Callable[..., Any], args: Sequence[Any] = args) -> Results:
        results, grads = outputs_and_gradients(f, args, options, upstream=upstream)
        named: Results = {f"output {i}": r for i, r in enumerate(results)}
        if inference:
            named |= {f"{name}{without}": r for name, r in named.items()}
        return named | {f"gradient {i}": g for i, g in enumerate(grads)}

    ours = run(fast or op.fast)
    outputs = [name for name in ours if name.startswith("output")]
    if inference:
        with torch.no_grad():
            result = (fast or op.fast)(*args, **options)
        results = result if isinstance(result, tuple) else (result,)
        ours |= {f"output {i}{without}": r for i, r in enumerate(results)}
    plain, *rounding = (functools.partial(run, f) for f in op.references)
    exact = run(op.reference, convert(args, Tensor.double))
    return judge_all(ours, plain, exact, outputs=outputs, rounding=rounding)
