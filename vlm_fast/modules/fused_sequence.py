"""Call modules one after the other, and fuse each linear, activation, linear into one op.

How the modules of a sequence run is a list of `Part`s. It is made at the first call, and again when
a child, a parameter, a hook or anything else that it depends on has changed (see `guard`). Modules
outside fusable runs are called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast.fallback import record_fallback
from vlm_fast.modules.direct_runs import (
    Part,
    mlp_part,
    mlp_steps,
    normed_parts,
    run_part,
    why_not_active,
    why_not_input,
    why_not_read,
)
from vlm_fast.modules.fusable_runs import Step, fusable_runs, why_no_fusable_run, without_norm
from vlm_fast.modules.parameter_access.dtypes import has_other_input
from vlm_fast.modules.parameter_access.guard import Guard
from vlm_fast.modules.parameter_access.remembered import recall, remember

_PARTS = "_parts_of_sequence"  # where the parts are stored on the module that is called


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


def remembered_run(owner: Any, x: Tensor) -> Any:
    """The result of `run_parts` by one op that is known to serve; otherwise NotImplemented."""
    parts: Sequence[Part] | None = recall(owner, _PARTS)
    if parts is None or len(parts) != 1:
        return NotImplemented
    direct = parts[0].direct
    if direct is None or has_other_input():
        return NotImplemented
    return direct.call.if_known(x, *direct.parameters, casts=direct.casts)


def run_parts(owner: str, x: Tensor, parts: Sequence[Part]) -> Any:
    """Apply all parts to ``x``. ``owner``: the name under which fallbacks are recorded."""
    for steps, direct, reason, smaller in parts:
        if direct is not None:
            found: Any = NotImplemented
            if not torch.compiler.is_compiling() and not has_other_input():
                found = direct.call.if_known(x, *direct.parameters, casts=direct.casts)
            if found is not NotImplemented:
                x = found
                continue
            if smaller:  # with a norm, which autocast computes in another dtype
                x = run_parts(owner, x, smaller)
                continue
            reason = why_not_input(steps, x)
            if reason is None:
                x = direct.call(x, *direct.parameters)
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
    parts: list[Part] = []
    for run in fusable_runs(steps, saved):
        if without_norm(run) is not run and len(run) > 1:
            parts += normed_parts(run, saved)
        else:
            parts.append(run_part(run, saved) if len(run) > 1 else Part(run))
    reason = why_no_fusable_run(steps, saved)
    return parts if reason is None else [Part((), None, reason), *parts]


def why_not_steps(steps: Sequence[Step], saved: str) -> str | None:
    """Why a fusable run would be called module by module next time, or None."""
    runs = [without_norm(run) for run in fusable_runs(steps, saved) if len(run) > 1]
    reasons = (why_not_read(run) or why_not_input(run, None) for run in runs)
    return why_no_fusable_run(steps, saved) or next((r for r in reasons if r is not None), None)


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
    run = mlp_steps(linear_1, act, linear_2)
    return why_not_active(run) or why_not_input(run, None)
