"""Fusable runs of modules whose parameters an op can read directly, and the reasons against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.modules.fusable_runs import FunctionalDropout, Step, active_steps, may_be_identity
from vlm_fast.modules.parameter_access.activation import activation_name, why_not_activation
from vlm_fast.modules.parameter_access.dtypes import why_dtypes_differ
from vlm_fast.modules.parameter_access.linear import why_not_direct
from vlm_fast.modules.parameter_access.module_calls import why_call_does_more
from vlm_fast.modules.parameter_access.norm import norm_parameters
from vlm_fast.ops.pixel_shuffle_norm import why_block_too_wide
from vlm_fast.ops.prepared_call import PreparedCall

MLP_NAMES = ("linear_1", "act", "linear_2")


class DirectRun(NamedTuple):
    """A fusable run as a call of its op, with parameters that can be read directly.

    Attributes:
        call: `vlm_fast.ops.mlp`, `norm_mlp` or `act_linear` with its options.
        parameters: its arguments after the input.
        options: its options.
        dtype: the dtype of all weights; None if they differ.
        casts: whether the op casts under autocast what the modules do: a linear is first.
    """

    call: PreparedCall
    parameters: tuple[Tensor | None, ...]
    options: dict[str, Any]
    dtype: torch.dtype | None
    casts: bool = False


class Part(NamedTuple):
    """A fusable run, or a single other step.

    Attributes:
        steps: in calling order.
        direct: the run as one op; None if the steps are called.
        reason: why the steps of a fusable run are called; None for a single step.
        smaller: the same steps in smaller parts, for inputs that ``direct`` does not take.
    """

    steps: Sequence[Step]
    direct: DirectRun | None = None
    reason: str | None = None
    smaller: Sequence[Part] = ()


def run_part(run: Sequence[Step], saved: str) -> Part:
    """A fusable run as a `Part`. ``saved``: see `vlm_fast.ops.mlp`."""
    reason = why_not_read(run)
    return Part(run, _direct(active_steps(run), saved) if reason is None else None, reason)


def normed_parts(run: Sequence[Step], saved: str) -> Sequence[Part]:
    """A norm and the fusable run behind it as one `Part`, or as two if the op cannot take both."""
    norm, *rest = run
    smaller = Part([norm]), run_part(rest, saved)
    direct, found = smaller[1].direct, norm_parameters(norm.call)
    if direct is None or isinstance(found, str) or found.weight.dtype is not direct.dtype:
        return smaller
    weight_1 = cast(Tensor, direct.parameters[0])
    if found.weight.shape[0] != weight_1.shape[1] or why_block_too_wide(weight_1, 1) is not None:
        return smaller
    options = {**direct.options, "norm": found.kind, "eps": found.eps}
    parameters = (found.weight, found.bias, *direct.parameters)
    call = ops.norm_mlp.prepared(**options)
    return (Part(run, DirectRun(call, parameters, options, direct.dtype), None, smaller),)


def _direct(active: Sequence[Step], saved: str) -> DirectRun:
    *first, act, last = (cast(Any, step.call) for step in active)
    owns = [linear._parameters for linear in (*first, last)]
    parameters = tuple([own[name] for own in owns for name in ("weight", "bias")])
    options: dict[str, Any] = {"activation": cast(str, activation_name(act))}
    if first:
        options["saved"] = saved
    dtype = owns[0]["weight"].dtype
    if owns[-1]["weight"].dtype is not dtype:
        dtype = None
    op: Any = ops.mlp if first else ops.act_linear
    return DirectRun(op.prepared(**options), parameters, options, dtype, bool(first))


def why_not_read(run: Sequence[Step]) -> str | None:
    """Why a module of a fusable run must be called, whatever its input; or None."""
    for step in run:
        if may_be_identity(step.call):
            reason = _why_not_identity(step.call)
            if reason is not None:
                return f"{step.name}: {reason}"
    return why_not_active(active_steps(run))


def why_not_active(active: Sequence[Step]) -> str | None:
    """As `why_not_read`, for the linears and the activation of a run."""
    for i, step in enumerate(active):
        why_not = why_not_activation if i == len(active) - 2 else why_not_direct
        reason = why_not(step.call)
        if reason is not None:
            return f"{step.name}: {reason}"
    return None


def why_not_input(run: Sequence[Step], x: Tensor | None) -> str | None:
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
    run = mlp_steps(*modules)
    reason = why_not_active(run)
    return Part(run, _direct(run, saved) if reason is None else None, reason)


def mlp_steps(*modules: Any) -> list[Step]:
    """Linear, activation and linear as steps."""
    return [Step(name, module) for name, module in zip(MLP_NAMES, modules, strict=True)]
