"""Is a module exactly ``[norm ->] linear_1 -> act -> linear_2``, whatever its class?

Told by structure: the children's names, and a symbolic run of the module's own forward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx, nn

from vlm_fast.modules.activation import activation_of


class Chain(NamedTuple):
    """The children in calling order: those before ``linear_1``, and the activation."""

    before: tuple[str, ...]
    act: str
    argument: str
    saved: str = "preactivation"


def chain_of(module: nn.Module, saved: str = "preactivation") -> Chain | str | None:
    """The chain, the reason why a candidate is none, or None for a module that is no candidate."""
    children = dict(module.named_children())
    if not {"linear_1", "linear_2"} <= children.keys():
        return None
    if "forward" in module.__dict__:
        return "its forward has been replaced (accelerate or another wrapper)"
    try:
        graph = _CallTracer().trace(module)
    except Exception as error:  # any forward may run here, so anything may be raised
        return f"its forward cannot be traced ({type(error).__name__})"
    *calls, result = graph.nodes
    arguments = [node for node in calls if node.op == "placeholder"]
    if len(arguments) != 1:
        return "its forward takes more than one argument"
    calls = [node for node in calls if node.op != "placeholder"]
    names = [node.target for node in calls]
    value: Any = arguments[0]
    for node in calls:
        if node.op != "call_module" or node.args != (value,) or node.kwargs:
            return "its forward is not a chain of its children"
        value = node
    if result.args != (value,):
        return "its forward is not a chain of its children"
    if len(names) < 3 or names[-3] != "linear_1" or names[-1] != "linear_2":
        return f"its forward is {' -> '.join(names)}, not linear_1 -> act -> linear_2"
    if activation_of(children[names[-2]]) is None:
        kind = type(children[names[-2]]).__name__
        return f"its activation {kind} is not one the kernels know"
    return Chain(tuple(names[:-3]), names[-2], arguments[0].target, saved)


class _CallTracer(fx.Tracer):
    """Records which children a forward calls, without looking into them."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True
