"""Which activation a module computes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vlm_fast.kernels.mlp import activate
from vlm_fast.modules.plain_linear import why_not_called_plainly

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


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)`` (CLIP's activation)."""

    def forward(self, x: Tensor) -> Tensor:
        return activate(x, "quick_gelu")


def activation_of(module: nn.Module) -> str | None:
    """Its name for `vlm_fast.ops.mlp`, or None if it is none of those."""
    kind = type(module)
    if isinstance(module, nn.GELU) and kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    if kind is nn.SiLU:
        return "silu"
    if kind is nn.ReLU:
        return "relu"
    if kind is QuickGELU:
        return "quick_gelu"
    if kind.__module__ == "transformers.activations":
        return _TRANSFORMERS.get(kind.__name__)
    return None


def why_not_activation(module: nn.Module) -> str | None:
    """None if the module does just the activation that `activation_of` names."""
    if activation_of(module) is None:
        return f"{type(module).__name__} is not an activation the kernels know"
    return why_not_called_plainly(module)


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
