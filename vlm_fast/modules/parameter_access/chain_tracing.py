"""Run the forward of a module symbolically (torch.fx) and list which children it calls.

The forward runs twice, in training and in eval mode, with gradients and autocast switched, so that
a forward that depends on these modes is recognised.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from vlm_fast.modules.fusable_runs import FunctionalDropout
from vlm_fast.modules.parameter_access.activation import GELUS, FunctionalActivation
from vlm_fast.modules.parameter_access.original_code import why_method_replaced

DEVICES = ("cpu", "cuda")
NO_CHAIN = "its forward is not a chain of its children"
# A call in a chain: the name of a child, or a function.
Call = str | FunctionalActivation | FunctionalDropout


def trace_calls(module: nn.Module) -> tuple[str, tuple[Call, ...]] | str:
    """The name of the forward's argument and its calls in order, or why the forward is no chain."""
    reason = why_method_replaced(type(module), "forward")
    if reason is not None:  # a wrapper may treat symbolic values differently from tensors
        return reason
    before = module.training
    modes = []
    try:
        for training in (True, False):
            module.training = training
            with _all_modes(training):
                found = _calls_in_this_mode(module)
            if isinstance(found, str):
                return found
            modes.append(found)
    finally:
        module.training = before
    (argument, in_training), (_, in_eval) = modes
    calls = list(map(_merge_modes, in_training, in_eval))
    if len(in_training) != len(in_eval) or None in calls:
        return "its forward is another one in training"
    return argument, tuple(call for call in calls if call is not None)


def _merge_modes(in_training: Call, in_eval: Call) -> Call | None:
    """One call for both modes, or None if the two differ."""
    inactive = FunctionalDropout(0.0, always=True)
    if isinstance(in_training, FunctionalDropout) and in_eval == inactive:
        return in_training._replace(always=False)
    return in_training if in_training == in_eval else None


def _calls_in_this_mode(module: nn.Module) -> tuple[str, list[Call]] | str:
    try:
        graph = _CallTracer().trace(module)
    except _ModesChanged:
        return "its forward switches gradients or autocast"
    except Exception as error:  # an unknown forward may raise anything
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
    """The child or known function that a node calls with one value; None for anything else."""
    rest = node.args[1:]
    if node.op == "call_module":
        plain = node.target in module._modules and not rest and not node.kwargs
        return str(node.target) if plain else None
    if node.op != "call_function" or rest:
        return None
    options: dict[str, Any] = {n: v for n, v in node.kwargs.items() if v is not False}
    if node.target is F.dropout:
        active = options.pop("training", False)
        p = options.pop("p", 0.5)
        return None if options else FunctionalDropout(float(p) if active else 0.0, always=True)
    if node.target is F.gelu:
        name = GELUS.get(options.pop("approximate", "none"))
    else:
        name = _FUNCTIONS.get(node.target)
    return None if options or name is None else FunctionalActivation(name)


_FUNCTIONS: dict[Any, str] = {F.silu: "silu", F.relu: "relu", torch.relu: "relu"}


class _CallTracer(fx.Tracer):
    """Records the calls of a forward without tracing into the children."""

    def __init__(self) -> None:
        super().__init__()
        self.modes = _current_modes()

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _current_modes() != self.modes:
            raise _ModesChanged
        return super().create_node(*args, **kwargs)


class _ModesChanged(Exception):
    """A forward calls a child in another gradient or autocast mode than its own."""


def _current_modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), *map(torch.is_autocast_enabled, DEVICES)


@contextlib.contextmanager
def _all_modes(on: bool) -> Iterator[None]:
    """Gradients and autocast all on, or all off, so that a forward that switches one is seen."""
    before = _current_modes()
    try:
        _set_modes(on, *[on] * len(DEVICES))
        yield
    finally:
        _set_modes(*before)


def _set_modes(gradients: bool, *autocasts: bool) -> None:
    torch.set_grad_enabled(gradients)
    for device, enabled in zip(DEVICES, autocasts, strict=True):
        torch.set_autocast_enabled(device, enabled)
