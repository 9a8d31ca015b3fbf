"""Call modules one after the other, and fuse each linear, activation, linear into one op.

How the modules of a sequence run is a list of `Part`s. It is made at the first call, and again when
a child, a parameter, a hook or anything else that it depends on has changed (see `guard`). Modules
outside fusable runs are called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.fallback import record_fallback
from vlm_fast.modules.fusable_runs import (
    FunctionalDropout,
    Step,
    active_steps,
    fusable_runs,
    may_be_identity,
    why_no_fusable_run,
)
from vlm_fast.modules.parameter_access.activation import activation_name, why_not_activation
from vlm_fast.modules.parameter_access.dtypes import is_common_dtype, why_dtypes_differ
from vlm_fast.modules.parameter_access.guard import Guard
from vlm_fast.modules.parameter_access.linear import why_not_direct
from vlm_fast.modules.parameter_access.module_calls import why_call_does_more
from vlm_fast.modules.parameter_access.remembered import recall, remember

_PARTS = "_parts_of_sequence"  # where the parts are stored on the module that is called
MLP_NAMES = ("linear_1", "act", "linear_2")


class DirectRun(NamedTuple):
    """A fusable run as a call of its op, with parameters that can be read directly.

    Attributes:
        op: `vlm_fast.ops.mlp` or `vlm_fast.ops.act_linear`.
        parameters: its arguments after the input.
        options: its options.
        dtype: the dtype of all weights; None if they differ.
    """

    op: Callable[..., Tensor]
    parameters: tuple[Tensor | None, ...]
    options: dict[str, str]
    dtype: torch.dtype | None


class Part(NamedTuple):
    """A fusable run, or a single other step.

    Attributes:
        steps: in calling order.
        direct: the run as one op; None if the steps are called.
        reason: why the steps of a fusable run are called; None for a single step.
    """

    steps: Sequence[Step]
    direct: DirectRun | None = None
    reason: str | None = None


def run_steps(owner: Any, x: Tensor, steps: Callable[[], Sequence[Step]], saved: str) -> Any:
    """Apply steps to ``x (..., features)``; fusable runs by one op each.

    Args:
        owner: the module that is called, which contains the modules of all steps.
        x: the input of the first step.
        steps: gives the steps in calling order. They may depend on what `Guard` records.
        saved: see `vlm_fast.ops.mlp`.
    """
    parts = recall(owner, _PARTS)
    if parts is None:
        parts = _parts(steps(), saved)
        remember_parts(owner, _PARTS, parts, parts)
    return run_parts(type(owner).__name__, x, parts)


def recalled_parts(owner: Any) -> Sequence[Part] | None:
    """The parts that `run_steps` would use for this module without asking anew, or None."""
    found: Sequence[Part] | None = recall(owner, _PARTS)
    return found


def run_parts(owner: str, x: Tensor, parts: Sequence[Part]) -> Any:
    """Apply all parts to ``x``. ``owner``: the name under which fallbacks are recorded."""
    for steps, direct, reason in parts:
        if direct is not None:
            if is_common_dtype(x, direct.dtype) and len(direct.parameters) == 4:
                reason = None
            else:
                reason = _why_not_input(steps, x)
            if reason is None:
                x = direct.op(x, *direct.parameters, **direct.options)
                continue
        if reason is not None:
            record_fallback(owner, reason)
        for step in steps:
            x = step.call(x)
    return x


def remember_parts(
    owner: Any, key: str, answer: Any, parts: Sequence[Part], *others: nn.Module
) -> None:
    """Store ``answer``, which depends on these parts and on other modules that are read."""
    if all(part.reason is None for part in parts):
        remember(owner, key, answer, lambda: _guard_of_parts(owner, parts, others))


def _guard_of_parts(owner: Any, parts: Sequence[Part], others: Sequence[nn.Module]) -> Guard:
    read = [step.call for part in parts if part.direct is not None for step in part.steps]
    modules = [call for call in read if isinstance(call, nn.Module)]
    guard = Guard(owner, (*others, *modules))
    guard.record_modes(owner, *modules)  # for dropouts, and functions that a forward calls
    return guard


def _parts(steps: Sequence[Step], saved: str) -> list[Part]:
    parts = [_part(run, saved) if len(run) > 1 else Part(run) for run in fusable_runs(steps, saved)]
    reason = why_no_fusable_run(steps, saved)
    return parts if reason is None else [Part((), None, reason), *parts]


def _part(run: Sequence[Step], saved: str) -> Part:
    reason = _why_not_read(run)
    return Part(run, _direct(active_steps(run), saved) if reason is None else None, reason)


def _direct(active: Sequence[Step], saved: str) -> DirectRun:
    *first, act, last = (cast(Any, step.call) for step in active)
    owns = [linear._parameters for linear in (*first, last)]
    parameters = tuple([own[name] for own in owns for name in ("weight", "bias")])
    options = {"activation": cast(str, activation_name(act))}
    if first:
        options["saved"] = saved
    dtype = owns[0]["weight"].dtype
    if owns[-1]["weight"].dtype is not dtype:
        dtype = None
    return DirectRun(ops.mlp if first else ops.act_linear, parameters, options, dtype)


def why_not_steps(steps: Sequence[Step], saved: str) -> str | None:
    """Why a fusable run would be called module by module next time, or None."""
    runs = [run for run in fusable_runs(steps, saved) if len(run) > 1]
    reasons = (_why_not_read(run) or _why_not_input(run, None) for run in runs)
    return why_no_fusable_run(steps, saved) or next((r for r in reasons if r is not None), None)


def _why_not_read(run: Sequence[Step]) -> str | None:
    """Why a module of a fusable run must be called, whatever its input; or None."""
    for step in run:
        if may_be_identity(step.call):
            reason = _why_not_identity(step.call)
            if reason is not None:
                return f"{step.name}: {reason}"
    return _why_not_active(active_steps(run))


def _why_not_active(active: Sequence[Step]) -> str | None:
    """`_why_not_read` for the linears and the activation of a run."""
    for i, step in enumerate(active):
        why_not = why_not_activation if i == len(active) - 2 else why_not_direct
        reason = why_not(step.call)
        if reason is not None:
            return f"{step.name}: {reason}"
    return None


def _why_not_input(run: Sequence[Step], x: Tensor | None) -> str | None:
    """Why a fusable run cannot take the input ``x``, or None; without x that of the last call."""
    *first, act, last = active_steps(run)
    reason = why_dtypes_differ(x, **{step.name: step.call for step in (*first, last)})
    return reason if first else reason or _why_not_cast_first(act.name, x)


def _why_not_identity(call: Any) -> str | None:
    """Why an identity or dropout does not return its input now, or None."""
    functional = type(call) is FunctionalDropout
    if (functional or (type(call) is not nn.Identity and call.training)) and call.p > 0:
        return f"it drops values (p={call.p})"
    return None if functional else why_call_does_more(call)


def _why_not_cast_first(name: str, x: Tensor | None) -> str | None:
    """Why autocast casts only after the activation ``name``, or None; the op would cast before."""
    if isinstance(x, Tensor):
        device = "cuda" if x.is_cuda else "cpu"
        if torch.is_autocast_enabled(device) and x.dtype is not torch.get_autocast_dtype(device):
            return f"{name}: it is computed in {x.dtype}, and autocast then"
    return None


def mlp_part(modules: Sequence[Any], saved: str) -> Part:
    """Linear, activation and linear as one `Part`. ``saved``: see `vlm_fast.ops.mlp`."""
    run = _mlp_steps(*modules)
    reason = _why_not_active(run)
    return Part(run, _direct(run, saved) if reason is None else None, reason)


def _mlp_steps(*modules: Any) -> list[Step]:
    return [Step(name, module) for name, module in zip(MLP_NAMES, modules, strict=True)]


def fused_mlp(owner: Any, x: Tensor, children: Callable[[Any], Sequence[Any]], saved: str) -> Any:
    """``linear_2(act(linear_1(x)))`` of ``x (..., features)``; fused if `why_not_fused` is None.

    Args:
        owner: the module that is called, under whose name a fallback is recorded.
        x: the input.
        children: gives linear_1, act and linear_2 of the owner.
        saved: see `vlm_fast.ops.mlp`.
    """
    parts = recall(owner, _PARTS)
    if parts is None:
        parts = (mlp_part(children(owner), saved),)
        remember_parts(owner, _PARTS, parts, parts)
    return run_parts(type(owner).__name__, x, parts)


def why_not_fused(linear_1: nn.Module, act: Any, linear_2: nn.Module) -> str | None:
    """Why linear, activation and linear cannot run as one op, or None.

    The input is taken to have the dtype of the last one.
    """
    run = _mlp_steps(linear_1, act, linear_2)
    return _why_not_active(run) or _why_not_input(run, None)
