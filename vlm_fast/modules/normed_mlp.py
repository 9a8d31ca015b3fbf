"""The norm and the MLP of a projector, and whether their parameters can be read directly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from vlm_fast.modules.direct_runs import Part, mlp_part
from vlm_fast.modules.fused_sequence import remember_parts, run_parts
from vlm_fast.modules.parameter_access.norm import NormParameters, norm_parameters
from vlm_fast.modules.parameter_access.remembered import recall

_STORED = "_normed_mlp"  # where it is stored on the projector


class NormedMLP(NamedTuple):
    """How the norm and the MLP of a projector run.

    Attributes:
        norm: the norm.
        parameters: what `norm_parameters` gives for it.
        parts: the MLP as one `Part`; empty for a projector without one.
    """

    norm: nn.Module
    parameters: NormParameters | str
    parts: tuple[Part, ...]

    def mlp(self, owner: str, x: Tensor) -> Any:
        """Apply the MLP to ``x (..., features)``. ``owner``: name for fallbacks."""
        return run_parts(owner, x, self.parts)


def recalled_normed_mlp(owner: Any) -> NormedMLP | None:
    """The `NormedMLP` of a module, if nothing that it depends on has changed; else None."""
    found: NormedMLP | None = recall(owner, _STORED)
    return found


def normed_mlp(
    owner: Any,
    children: Callable[[Any], Sequence[Any]],
    saved: str = "preactivation",
    *others: nn.Module,
) -> NormedMLP:
    """The `NormedMLP` of a module that is called.

    Args:
        owner: the module.
        children: gives the norm, linear_1, act and linear_2 of the owner; or only the norm.
        saved: see `vlm_fast.ops.mlp`.
        others: further modules inside the owner that the caller has asked about.
    """
    found = recalled_normed_mlp(owner)
    if found is not None:
        return found
    norm, *mlp = children(owner)
    parts = (mlp_part(mlp, saved),) if mlp else ()
    found = NormedMLP(norm, norm_parameters(norm), parts)
    if isinstance(found.parameters, NormParameters):
        remember_parts(owner, _STORED, found, parts, norm, *others)
    return found
