"""Is a module a chain, in which each child takes what the one before it returns?

An nn.Sequential is one. Of other classes it is told by a symbolic run of the module's own forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from vlm_fast.modules.fused_sequence import FunctionalDropout, Step, is_linear, why_no_fusable_run
from vlm_fast.modules.parameter_access.activation import (
    GELUS,
    FunctionalActivation,
    activation_name,
)
from vlm_fast.modules.parameter_access.original_code import (
    why_method_replaced,
    why_not_original_code,
)

DEVICES = ("cpu", "cuda")
NO_CHAIN = "its forward is not a chain of its children"
Call = str | FunctionalActivation | FunctionalDropout


class Chain(NamedTuple):
    """What a module calls, in calling order.

    Attributes:
        calls: names of children, and functions; None for an nn.Sequential, which calls the children
            that it has.
        argument: the name of its input.
        saved: see `vlm_fast.ops.mlp`.
        children, read: names of all children, and values of what else the forward may have read.
    """

    calls: tuple[Call, ...] | None
    argument: str
    saved: str = "preactivation"
    children: tuple[str, ...] = ()
    read: tuple[tuple[str, Any], ...] = ()

    def steps(self, module: nn.Module) -> list[Step]:
        """The children that the module has now, and the functions that are active."""
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
        """What the forward of the module may go by that is another than when it was traced."""
        if self.calls is None:
            return None
        if tuple(module._modules) != self.children:
            return "it has other children than when it was patched"
        for name, value in self.read:
            found = getattr(module, name, None)
            if type(found) is not type(value) or found != value:
                return f"{name} is another than when it was patched"
        return None


def find_chain(module: nn.Module, saved: str = "preactivation") -> Chain | str | None:
    """The chain, the reason why a candidate is none, or None for a module that is no candidate."""
    kind = type(module)
    sequential = kind.forward is nn.Sequential.forward
    if kind.__module__.startswith("vlm_fast."):
        return None
    if not (_is_long(module) if sequential else _is_candidate(module)):
        return None
    if "forward" in module.__dict__:
        return "its forward has been replaced (accelerate or another wrapper)"
    if not sequential:
        found = _traced(module)
    elif getattr(kind, "__iter__", None) is not nn.Sequential.__iter__:
        found = NO_CHAIN
    else:
        found = why_not_original_code(kind) or Chain(None, "input")
    if isinstance(found, str):
        return found
    reason = why_no_fusable_run(found.steps(module), saved)
    return reason if reason is not None else found._replace(saved=saved)


def _is_long(module: nn.Module) -> bool:
    return sum(is_linear(child) for child in module.children()) >= 2


def _is_candidate(module: nn.Module) -> bool:
    """Whether the forward of a module may be run symbolically, to see if it is a chain.

    Those whose children are named as LLaVA's, and those of linears with activations, norms and
    dropouts alone: others may do anything when they run.
    """
    if type(module).forward is nn.Module.forward:  # a container
        return False
    if module._modules.keys() >= {"linear_1", "linear_2"}:
        return True
    parts = all(is_linear(c) or _is_between(c) for c in module.children())
    return parts and _is_long(module) and not module._parameters


def _is_between(child: nn.Module) -> bool:
    if child._modules:
        return activation_name(child) is not None
    return not child._parameters or "norm" in type(child).__name__.lower()


def _traced(module: nn.Module) -> Chain | str:
    """The chain of a module of another class, or why it is none."""
    reason = why_method_replaced(type(module), "forward")
    if reason is not None:  # a wrapper may take tensors otherwise than what stands for them
        return reason
    before = module.training
    modes = []
    try:
        for training in (True, False):
            module.training = training
            with _all_modes(training):
                found = _calls(module)
            if isinstance(found, str):
                return found
            modes.append(found)
    finally:
        module.training = before
    (argument, trained), (_, evaluated) = modes
    calls = list(map(_in_both, trained, evaluated))
    if len(trained) != len(evaluated) or None in calls:
        return "its forward is another one in training"
    known = tuple(call for call in calls if call is not None)
    for name, child in module._modules.items():
        if child is not None and name not in known:  # another one might be called
            return f"its forward leaves out {name}"
    return Chain(known, argument, "", tuple(module._modules), _read(module))


def _in_both(trained: Call, evaluated: Call) -> Call | None:
    """What a forward calls in training and in evaluation, or None for two things."""
    if isinstance(trained, FunctionalDropout) and evaluated == FunctionalDropout(0.0, always=True):
        return trained._replace(always=False)
    return trained if trained == evaluated else None


def _calls(module: nn.Module) -> tuple[str, list[Call]] | str:
    """The name of the input, and what a call would call in the mode that the module is in."""
    try:
        graph = _CallTracer().trace(module)
    except _ModesChanged:
        return "its forward switches gradients or autocast"
    except Exception as error:  # any forward may run here, so anything may be raised
        return f"its forward cannot be traced ({type(error).__name__})"
    arguments = [node for node in graph.nodes if node.op == "placeholder"]
    if len(arguments) != 1 or str(arguments[0].target).startswith("*"):
        return "its forward takes more than one argument"
    value = arguments[0]
    calls: list[Call] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        if node.args[:1] != (value,):
            return NO_CHAIN
        if node.op == "output":
            break
        call = _call(module, node)
        if call is None:
            return NO_CHAIN
        calls.append(call)
        value = node
    return str(arguments[0].target), calls


def _call(module: nn.Module, node: fx.Node) -> Call | None:
    """The child or the function that a node calls with one value, or None for anything else."""
    rest = node.args[1:]
    if node.op == "call_module":
        plain = node.target in module._modules and not rest and not node.kwargs
        return str(node.target) if plain else None
    if node.op != "call_function" or rest:
        return None
    options: dict[str, Any] = {n: v for n, v in node.kwargs.items() if v is not False}
    if node.target is F.dropout:
        live = options.pop("training", False)
        p = options.pop("p", 0.5)
        return None if options else FunctionalDropout(float(p) if live else 0.0, always=True)
    if node.target is F.gelu:
        name = GELUS.get(options.pop("approximate", "none"))
    else:
        name = _FUNCTIONS.get(node.target)
    return None if options or name is None else FunctionalActivation(name)


_FUNCTIONS: dict[Any, str] = {F.silu: "silu", F.relu: "relu", torch.relu: "relu"}


def _read(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Attributes that a forward may go by, with values that can be compared."""
    own = {**vars(module), **{n: c for n, c in module._modules.items() if c is None}}
    kinds = (bool, int, float, str, type(None), FunctionType, BuiltinFunctionType)
    return tuple(
        (name, value)
        for name, value in own.items()
        if not name.startswith("_") and name != "training" and isinstance(value, kinds)
    )


class _CallTracer(fx.Tracer):
    """Records which children a forward calls, without looking into them."""

    def __init__(self) -> None:
        super().__init__()
        self.modes = _modes()

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise _ModesChanged
        return super().create_node(*args, **kwargs)


class _ModesChanged(Exception):
    """A forward calls its children in another mode than it is called in."""


def _modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), *map(torch.is_autocast_enabled, DEVICES)


@contextlib.contextmanager
def _all_modes(on: bool) -> Iterator[None]:
    """Gradients and autocast on, or all of them off, so that who switches one is seen."""
    before = _modes()
    try:
        _switch(on, *[on] * len(DEVICES))
        yield
    finally:
        _switch(*before)


def _switch(gradients: bool, *autocasts: bool) -> None:
    torch.set_grad_enabled(gradients)
    for device, enabled in zip(DEVICES, autocasts, strict=True):
        torch.set_autocast_enabled(device, enabled)
