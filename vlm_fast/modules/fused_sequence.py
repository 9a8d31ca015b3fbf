"""Modules called one after the other, with what lies from linear to linear fused.

A run is linear, activation, linear; or activation, linear, where no linear is left before it. Which
runs there are is asked at each call, of the modules that are there then. All others are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.fallback import record_fallback
from vlm_fast.modules.parameter_access.activation import activation_name, why_not_activation
from vlm_fast.modules.parameter_access.dtypes import why_dtypes_differ
from vlm_fast.modules.parameter_access.linear import why_not_direct
from vlm_fast.modules.parameter_access.module_calls import why_call_does_more

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class FunctionalDropout(NamedTuple):
    """``F.dropout`` in a forward; ``always``: in evaluation too."""

    p: float
    always: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, training=True)


class Step(NamedTuple):
    """A module, or a function, and the name that it has in a reason."""

    name: str
    call: Any


def is_linear(module: Any) -> bool:
    """Whether this is a linear, or what stands in the place of one, as an adapter."""
    if type(module) is nn.Linear:
        return True
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _passes(call: Any) -> bool:
    """Whether a step may be one that returns its input."""
    return type(call) is nn.Identity or type(call) in (*_DROPOUTS, FunctionalDropout)


def _why_not_passed(call: Any) -> str | None:
    """Why a step does not return its input, or None."""
    functional = type(call) is FunctionalDropout
    if (functional or (type(call) is not nn.Identity and call.training)) and call.p > 0:
        return f"it drops values (p={call.p})"
    return None if functional else why_call_does_more(call)


def fusable_runs(steps: Sequence[Step], saved: str) -> list[Sequence[Step]]:
    """The steps in order: those of a run together, each other one alone."""
    parts: list[Sequence[Step]] = []
    i = 0
    while i < len(steps):
        end = _end_of_run(steps, i, saved)
        parts.append(steps[i:end])
        i = end
    return parts


def _end_of_run(steps: Sequence[Step], i: int, saved: str) -> int:
    """Where the run that starts at step ``i`` ends; ``i + 1`` if none does."""
    first = steps[i].call
    act = _next(steps, i) if is_linear(first) else i
    if act == len(steps) or activation_name(steps[act].call) is None:
        return i + 1
    if act == i and (saved == "all" or getattr(first, "inplace", False)):
        return i + 1  # the activation is to be kept, or is written over what may be the caller's
    last = _next(steps, act)
    return last + 1 if last < len(steps) and is_linear(steps[last].call) else i + 1


def _next(steps: Sequence[Step], i: int) -> int:
    """The next step after ``i`` that does something."""
    i += 1
    while i < len(steps) and _passes(steps[i].call):
        i += 1
    return i


def run_steps(owner: str, x: Tensor, steps: Sequence[Step], saved: str) -> Any:
    """Every step of the last one's result; runs through `vlm_fast.ops.mlp` and `act_linear`."""
    parts = fusable_runs(steps, saved)
    if len(parts) == len(steps):
        reason = why_no_fusable_run(steps, saved)
        if reason is not None:
            record_fallback(owner, reason)
    for part in parts:
        reason = "" if len(part) == 1 else _why_not_run(part, x)
        if reason is None:
            x = _fused(part, x, saved)
            continue
        if reason:
            record_fallback(owner, reason)
        for step in part:
            x = step.call(x)
    return x


def why_not_steps(steps: Sequence[Step], saved: str) -> str | None:
    """Why a run would be called module by module next time, or None."""
    reasons = (_why_not_run(part) for part in fusable_runs(steps, saved) if len(part) > 1)
    return why_no_fusable_run(steps, saved) or next((r for r in reasons if r is not None), None)


def why_no_fusable_run(steps: Sequence[Step], saved: str) -> str | None:
    """Why steps with two linears or more hold no run; None if they do, or have fewer."""
    linears = [i for i, step in enumerate(steps) if is_linear(step.call)]
    if len(linears) < 2 or len(fusable_runs(steps, saved)) < len(steps):
        return None
    inside = steps[linears[0] + 1 : linears[1]]
    between = [type(step.call).__name__ for step in inside if not _passes(step.call)]
    if not between:
        return "no activation stands between its linears"
    if len(between) == 1:
        return f"its activation {between[0]} is not one the kernels know"
    return f"{' -> '.join(between)} stands between its linears, not one activation"


def _why_not_run(run: Sequence[Step], x: Tensor | None = None) -> str | None:
    """None, or which step of a run must be called and why; ``x``: None for the last input."""
    for step in run:
        if _passes(step.call):
            reason = _why_not_passed(step.call)
            if reason is not None:
                return f"{step.name}: {reason}"
    names, calls = zip(*_active(run), strict=True)
    if len(calls) == 3:
        return why_not_fused(*calls, x, names)
    act, linear = calls
    reason = why_not_activation(act)
    if reason is not None:
        return f"{names[0]}: {reason}"
    reason = why_not_direct(linear)
    if reason is not None:
        return f"{names[1]}: {reason}"
    return why_dtypes_differ(x, **{names[1]: linear}) or _why_not_cast_first(names[0], x)


def _why_not_cast_first(name: str, x: Tensor | None) -> str | None:
    """Autocast casts what a linear takes; its activation is computed before."""
    if isinstance(x, Tensor):
        device = "cuda" if x.is_cuda else "cpu"
        if torch.is_autocast_enabled(device) and x.dtype is not torch.get_autocast_dtype(device):
            return f"{name}: it is computed in {x.dtype}, and autocast then"
    return None


def _active(run: Sequence[Step]) -> list[Step]:
    return [step for step in run if not _passes(step.call)]


def _fused(run: Sequence[Step], x: Tensor, saved: str) -> Tensor:
    *linears, act, last = (cast(Any, step.call) for step in _active(run))
    activation = cast(str, activation_name(act))
    if not linears:
        return ops.act_linear(x, last.weight, last.bias, activation=activation)
    (first,) = linears
    return ops.mlp(
        x, first.weight, first.bias, last.weight, last.bias, activation=activation, saved=saved
    )


def fused_mlp(
    owner: str, x: Tensor, linear_1: nn.Module, act: nn.Module, linear_2: nn.Module, saved: str
) -> Tensor:
    """``linear_2(act(linear_1(x)))``, fused where `why_not_fused` finds no reason against it."""
    reason = why_not_fused(linear_1, act, linear_2, x)
    if reason is not None:
        record_fallback(owner, reason)
        return linear_2(act(linear_1(x)))
    first, second = cast(nn.Linear, linear_1), cast(nn.Linear, linear_2)
    return ops.mlp(
        x, first.weight, first.bias, second.weight, second.bias,
        activation=cast(str, activation_name(act)), saved=saved,
    )  # fmt: skip


def why_not_fused(
    linear_1: nn.Module,
    act: Any,
    linear_2: nn.Module,
    x: Tensor | None = None,
    names: Sequence[str] = ("linear_1", "act", "linear_2"),
) -> str | None:
    """None, or which child cannot be fused and why; ``x``: the input, None for the last one."""
    questions = (why_not_direct, why_not_activation, why_not_direct)
    for name, why_not, child in zip(names, questions, (linear_1, act, linear_2), strict=True):
        reason = why_not(child)
        if reason is not None:
            return f"{name}: {reason}"
    return why_dtypes_differ(x, **{names[0]: linear_1, names[2]: linear_2})
