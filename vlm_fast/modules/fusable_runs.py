"""Find the runs of modules that one op computes, in a sequence of modules called in a row.

A fusable run is linear, activation, linear (`vlm_fast.ops.mlp`), with or without a norm before it
(`vlm_fast.ops.norm_mlp`); or activation, linear if the linear before it belongs to another run
(`vlm_fast.ops.act_linear`). Identities and dropouts may stand between linears and activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from vlm_fast.modules.parameter_access.activation import activation_name
from vlm_fast.modules.parameter_access.norm import norm_kind

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


def may_be_identity(call: Any) -> bool:
    """Whether a step is an nn.Identity or a dropout, which may return its input."""
    return type(call) is nn.Identity or type(call) in (*_DROPOUTS, FunctionalDropout)


def active_steps(run: Sequence[Step]) -> list[Step]:
    """The steps of a run that are no identities or dropouts."""
    return [step for step in run if not may_be_identity(step.call)]


def without_norm(run: Sequence[Step]) -> Sequence[Step]:
    """A fusable run without the norm that may stand before it."""
    return run if norm_kind(run[0].call)[0] is None else run[1:]


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
    if norm_kind(first)[0] is not None and i + 1 < len(steps) and is_linear(steps[i + 1].call):
        end = _end_of_run(steps, i + 1, saved)
        return end if end > i + 2 else i + 1
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
    while i < len(steps) and may_be_identity(steps[i].call):
        i += 1
    return i


def why_no_fusable_run(steps: Sequence[Step], saved: str) -> str | None:
    """Why steps with two or more linears contain no fusable run; else None."""
    linears = [i for i, step in enumerate(steps) if is_linear(step.call)]
    if len(linears) < 2 or len(fusable_runs(steps, saved)) < len(steps):
        return None
    inside = steps[linears[0] + 1 : linears[1]]
    between = [type(step.call).__name__ for step in inside if not may_be_identity(step.call)]
    if not between:
        return "no activation stands between its linears"
    if len(between) == 1:
        return f"its activation {between[0]} is not one the kernels know"
    return f"{' -> '.join(between)} stands between its linears, not one activation"
