"""Which activation function does a module compute, by the name that the ops know it by?"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from vlm_fast.modules.parameter_access.module_calls import why_call_does_more
from vlm_fast.modules.parameter_access.original_code import why_not_original_code
from vlm_fast.ops.activations import activate
from vlm_fast.ops.transforms import constant_while_compiling

# By class name, so that transformers is never imported here. NewGELU and FastGELU write the tanh
# approximation in Python; it is the same function.
_TRANSFORMERS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
}
GELUS = {"none": "gelu", "tanh": "gelu_tanh"}  # keys: the `approximate` argument of F.gelu


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, the activation of CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to each element of ``x``, of any shape."""
        return activate(x, "quick_gelu")


class FunctionalActivation(NamedTuple):
    """An activation that a forward calls as a function, e.g. ``F.gelu``."""

    name: str

    def __call__(self, x: Tensor) -> Tensor:
        return activate(x, self.name)


def activation_name(module: Any) -> str | None:
    """The name of a module's activation for `vlm_fast.ops.mlp`, or None for any other module."""
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
    """Whether a subclass of nn.GELU inherits its forward and its call."""
    return kind.forward is nn.GELU.forward and kind.__call__ is nn.GELU.__call__


# For each class with GELU in its name: its forward, and whether that is x * sigmoid(1.702 x).
_forwards: WeakKeyDictionary[type, tuple[Any, bool]] = WeakKeyDictionary()


@constant_while_compiling
def _is_quick_gelu(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class computes CLIP's activation. The result is cached."""
    known = _forwards.get(kind)
    if known is None or known[0] is not kind.forward:
        known = _forwards[kind] = (kind.forward, _traces_to_quick_gelu(kind))
    return known[1]


def _traces_to_quick_gelu(kind: type[nn.Module]) -> bool:
    if why_not_original_code(kind) is not None or kind.__call__ is not nn.Module.__call__:
        return False
    bare = kind.__new__(kind)  # no attributes: another instance may have other values
    nn.Module.__init__(bare)
    try:
        nodes = list(fx.Tracer().trace(bare).nodes)
    except Exception:  # an unknown forward may raise anything
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
    """Why a module is not, or does more than, an activation that the kernels know; or None."""
    if activation_name(module) is None:
        return f"{type(module).__name__} is not an activation the kernels know"
    return None if type(module) is FunctionalActivation else why_call_does_more(module)


def activation_module(name: str) -> nn.Module:
    """A new module for one of the activations that the kernels know.

    Raises:
        ValueError: ``name`` is unknown.
    """
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
