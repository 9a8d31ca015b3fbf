"""Call modules one after the other, and fuse each linear, activation, linear into one op.

A fusable run is linear, activation, linear (`vlm_fast.ops.mlp`), or activation, linear if the
linear before it belongs to another run (`vlm_fast.ops.act_linear`). The runs are found anew at each
call, because children may have been replaced. All other modules are called.
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
    """A call of ``F.dropout`` in a forward; ``always``: in eval mode too."""

    p: float
    always: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, training=True)


class Step(NamedTuple):
    """A module or function to call, and its name for reasons."""

    name: str
    call: Any


def is_linear(module: Any) -> bool:
    """Whether a module is a linear or replaces one, such as an adapter or a quantized linear."""
    if type(module) is nn.Linear:
        return True
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _may_be_identity(call: Any) -> bool:
    """Whether a step is an nn.Identity or a dropout, which may return its input."""
    return type(call) is nn.Identity or type(call) in (*_DROPOUTS, FunctionalDropout)


def _why_not_identity(call: Any) -> str | None:
    """Why an identity or dropout does not return its input now, or None."""
    functional = type(call) is FunctionalDropout
    if (functional or (type(call) is not nn.Identity and call.training)) and call.p > 0:
        return f"it drops values (p={call.p})"
    return None if functional else why_call_does_more(call)


def fusable_runs(steps: Sequence[Step], saved: str) -> list[Sequence[Step]]:
    """The steps in order, in groups: one for each fusable run, and one for each other step."""
    parts: list[Sequence[Step]] = []
    i = 0
    while i < len(steps):
        end = _end_of_run(steps, i, saved)
        parts.append(steps[i:end])
        i = end
    return parts


def _end_of_run(steps: Sequence[Step], i: int, saved: str) -> int:
    """The end index of the fusable run that starts at step ``i``; ``i + 1`` if there is none."""
    first = steps[i].call
    act = _next_active(steps, i) if is_linear(first) else i
    if act == len(steps) or activation_name(steps[act].call) is None:
        return i + 1
    if act == i and (saved == "all" or getattr(first, "inplace", False)):
        return i + 1  # its output is kept for backward, or it would overwrite its input
    last = _next_active(steps, act)
    return last + 1 if last < len(steps) and is_linear(steps[last].call) else i + 1


def _next_active(steps: Sequence[Step], i: int) -> int:
    """The index of the next step after ``i`` that cannot be an identity."""
    i += 1
    while i < len(steps) and _may_be_identity(steps[i].call):
        i += 1
    return i


def run_steps(owner: str, x: Tensor, steps: Sequence[Step], saved: str) -> Any:
    """Apply all steps to ``x (..., features)``; fusable runs by one op each.

    Args:
        owner: name under which fallbacks are recorded.
        x: the input of the first step.
        steps: in calling order.
        saved: see `vlm_fast.ops.mlp`.
    """
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
    """Why a fusable run would be called module by module next time, or None."""
    reasons = (_why_not_run(part) for part in fusable_runs(steps, saved) if len(part) > 1)
    return why_no_fusable_run(steps, saved) or next((r for r in reasons if r is not None), None)


def why_no_fusable_run(steps: Sequence[Step], saved: str) -> str | None:
    """Why steps with two or more linears contain no fusable run; else None."""
    linears = [i for i, step in enumerate(steps) if is_linear(step.call)]
    if len(linears) < 2 or len(fusable_runs(steps, saved)) < len(steps):
        return None
    inside = steps[linears[0] + 1 : linears[1]]
    between = [type(step.call).__name__ for step in inside if not _may_be_identity(step.call)]
    if not between:
        return "no activation stands between its linears"
    if len(between) == 1:
        return f"its activation {between[0]} is not one the kernels know"
    return f"{' -> '.join(between)} stands between its linears, not one activation"


def _why_not_run(run: Sequence[Step], x: Tensor | None = None) -> str | None:
    """Why a step of a fusable run must be called as a module, or None.

    ``x``: the input of the run; None stands for that of the last call.
    """
    for step in run:
        if _may_be_identity(step.call):
            reason = _why_not_identity(step.call)
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
    """Why autocast casts only after the activation ``name``, or None; the op would cast before."""
    if isinstance(x, Tensor):
        device = "cuda" if x.is_cuda else "cpu"
        if torch.is_autocast_enabled(device) and x.dtype is not torch.get_autocast_dtype(device):
            return f"{name}: it is computed in {x.dtype}, and autocast then"
    return None


def _active(run: Sequence[Step]) -> list[Step]:
    return [step for step in run if not _may_be_identity(step.call)]


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
    """``linear_2(act(linear_1(x)))`` of ``x (..., features)``; fused if `why_not_fused` is None.

    ``owner``: name under which a fallback is recorded; ``saved``: see `vlm_fast.ops.mlp`.
    """
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
    """Why linear, activation and linear cannot run as one op, or None.

    Args:
        linear_1, act, linear_2: the modules.
        x: the input; None stands for that of the last call.
        names: of the three modules, for the reason.
    """
    checks = (why_not_direct, why_not_activation, why_not_direct)
    for name, why_not, child in zip(names, checks, (linear_1, act, linear_2), strict=True):
        reason = why_not(child)
        if reason is not None:
            return f"{name}: {reason}"
    return why_dtypes_differ(x, **{names[0]: linear_1, names[2]: linear_2})
