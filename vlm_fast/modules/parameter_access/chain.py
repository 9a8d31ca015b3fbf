"""Does the forward of a module call its children one after the other, each on the last result?

An nn.Sequential does. For other classes `chain_tracing` runs the module's own forward symbolically.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from vlm_fast.modules.fusable_runs import Step, is_linear, why_no_fusable_run
from vlm_fast.modules.parameter_access.activation import FunctionalActivation, activation_name
from vlm_fast.modules.parameter_access.chain_tracing import (
    NO_CHAIN,
    Call,
    trace_calls,
)
from vlm_fast.modules.parameter_access.module_calls import FORWARD_REPLACED, has_replaced_forward
from vlm_fast.modules.parameter_access.original_code import why_not_original_code
from vlm_fast.modules.parameter_access.recordable import plain_attributes


class Chain(NamedTuple):
    """The children and functions that a forward calls, in calling order.

    Attributes:
        calls: names of children, and functions; None for an nn.Sequential, which calls all children
            that it has at the time.
        argument: the name of the forward's argument.
        saved: see `vlm_fast.ops.mlp`.
        children: names of all children when the forward was traced.
        attributes: names and values of the other attributes that the forward may have read.
    """

    calls: tuple[Call, ...] | None
    argument: str
    saved: str = "preactivation"
    children: tuple[str, ...] = ()
    attributes: tuple[tuple[str, Any], ...] = ()

    def steps(self, module: nn.Module) -> list[Step]:
        """The current children of the module and the active functions, in calling order."""
        if self.calls is None:
            return [Step(name, child) for name, child in module._modules.items()]
        steps = []
        for call in self.calls:
            if isinstance(call, str):
                steps.append(Step(call, getattr(module, call)))
            elif isinstance(call, FunctionalActivation):
                steps.append(Step(call.name, call))
            elif call.p > 0 and (call.always or module.training):
                steps.append(Step("dropout", call))
        return steps

    def why_changed(self, module: nn.Module) -> str | None:
        """Why the forward may call other modules than when it was traced, or None."""
        if self.calls is None:
            return None
        if tuple(module._modules) != self.children:
            return "it has other children than when it was patched"
        for name, value in self.attributes:
            found = getattr(module, name, None)
            if type(found) is not type(value) or found != value:
                return f"{name} is another than when it was patched"
        return None


def find_chain(module: nn.Module, saved: str = "preactivation") -> Chain | str | None:
    """The chain of a module, the reason why it is none, or None for an unlikely module."""
    kind = type(module)
    sequential = kind.forward is nn.Sequential.forward
    if kind.__module__.startswith("vlm_fast."):
        return None
    if not (_has_two_linears(module) if sequential else _is_candidate(module)):
        return None
    if has_replaced_forward(module):
        return FORWARD_REPLACED
    if not sequential:
        found = _traced_chain(module)
    elif getattr(kind, "__iter__", None) is not nn.Sequential.__iter__:
        found = NO_CHAIN
    else:
        found = why_not_original_code(kind) or Chain(None, "input")
    if isinstance(found, str):
        return found
    reason = why_no_fusable_run(found.steps(module), saved)
    return reason if reason is not None else found._replace(saved=saved)


def _traced_chain(module: nn.Module) -> Chain | str:
    found = trace_calls(module)
    if isinstance(found, str):
        return found
    argument, calls = found
    for name, child in module._modules.items():
        if child is not None and name not in calls:  # another call might run it
            return f"its forward leaves out {name}"
    missing = [(name, None) for name, child in module._modules.items() if child is None]
    attributes = (*plain_attributes(module), *missing)
    return Chain(calls, argument, "", tuple(module._modules), attributes)


def _has_two_linears(module: nn.Module) -> bool:
    return sum(is_linear(child) for child in module.children()) >= 2


def _is_candidate(module: nn.Module) -> bool:
    """Whether the forward of a module may be run symbolically, to see whether it is a chain.

    That holds for modules whose children are named as LLaVA's, and for those that hold only
    linears, activations, norms and dropouts. Other forwards may have side effects.
    """
    if type(module).forward is nn.Module.forward:  # a container
        return False
    if module._modules.keys() >= {"linear_1", "linear_2"}:
        return True
    parts = all(is_linear(c) or _is_elementwise_or_norm(c) for c in module.children())
    return parts and _has_two_linears(module) and not module._parameters


def _is_elementwise_or_norm(child: nn.Module) -> bool:
    if child._modules:
        return activation_name(child) is not None
    return not child._parameters or "norm" in type(child).__name__.lower()
