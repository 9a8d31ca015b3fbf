"""Which activation a module computes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from vlm_fast.kernels.mlp import activate
from vlm_fast.modules.parameter_access.linear import why_call_does_more
from vlm_fast.modules.parameter_access.original_code import why_not_original_code
from vlm_fast.ops.registration import constant_while_compiling

# By name, so that transformers is never imported here. NewGELU and FastGELU write the tanh formula
# out in Python; it is the same function.
_TRANSFORMERS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
}
GELUS = {"none": "gelu", "tanh": "gelu_tanh"}  # by torch's name of their approximation


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)`` (CLIP's activation)."""

    def forward(self, x: Tensor) -> Tensor:
        return activate(x, "quick_gelu")


class FunctionalActivation(NamedTuple):
    """An activation that a forward calls as a function, as ``F.gelu``."""

    name: str

    def __call__(self, x: Tensor) -> Tensor:
        return activate(x, self.name)


def activation_name(module: Any) -> str | None:
    """Its name for `vlm_fast.ops.mlp`, or None if it is none of those."""
    kind = type(module)
    if kind is FunctionalActivation:
        name: str = module.name
        return name
    if kind is nn.SiLU:
        return "silu"
    if kind is nn.ReLU:
        return "relu"
    if kind is QuickGELU:
        return "quick_gelu"
    if kind is nn.GELU or (isinstance(module, nn.GELU) and _only_adds(kind)):
        return GELUS.get(module.approximate)
    if kind.__module__ == "transformers.activations":
        return _TRANSFORMERS.get(kind.__name__)
    if "gelu" in kind.__name__.lower() and isinstance(module, nn.Module):
        return "quick_gelu" if _is_quick_gelu(kind) else None
    return None


@constant_while_compiling
def _only_adds(kind: type[nn.GELU]) -> bool:
    """Whether a call of this subclass is one of nn.GELU."""
    return kind.forward is nn.GELU.forward and kind.__call__ is nn.GELU.__call__


# Of classes with GELU in their names: a forward, and whether it is x * sigmoid(1.702 x).
_forwards: WeakKeyDictionary[type, tuple[Any, bool]] = WeakKeyDictionary()


@constant_while_compiling
def _is_quick_gelu(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class is CLIP's activation, written out."""
    known = _forwards.get(kind)
    if known is None or known[0] is not kind.forward:
        known = _forwards[kind] = (kind.forward, _writes_quick_gelu(kind))
    return known[1]


def _writes_quick_gelu(kind: type[nn.Module]) -> bool:
    if why_not_original_code(kind) is not None or kind.__call__ is not nn.Module.__call__:
        return False
    bare = kind.__new__(kind)  # without attributes, which another instance may have otherwise
    nn.Module.__init__(bare)
    try:
        nodes = list(fx.Tracer().trace(bare).nodes)
    except Exception:  # any forward may run here, so anything may be raised
        return False
    if [node.op for node in nodes[:1]] != ["placeholder"] or len(nodes) != 5:
        return False
    x, scaled, gate, product, output = nodes
    sigmoids = (torch.sigmoid, F.sigmoid, "sigmoid")
    return (
        _is_product(scaled, x, 1.702)
        and gate.target in sigmoids
        and gate.args == (scaled,)
        and not gate.kwargs
        and _is_product(product, x, gate)
        and output.args == (product,)
    )


def _is_product(node: fx.Node, *factors: Any) -> bool:
    named = node.target in (operator.mul, torch.mul) and not node.kwargs
    return named and node.args in (factors, factors[::-1])


def why_not_activation(module: Any) -> str | None:
    """None if the module does just the activation that `activation_name` names."""
    if activation_name(module) is None:
        return f"{type(module).__name__} is not an activation the kernels know"
    return None if type(module) is FunctionalActivation else why_call_does_more(module)


def activation_module(name: str) -> nn.Module:
    """A module for one of the kernels' activations."""
    if name not in _MODULES:
        raise ValueError(f"activation is {name!r}, expected one of {tuple(_MODULES)}")
    return _MODULES[name]()


_MODULES: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
}
