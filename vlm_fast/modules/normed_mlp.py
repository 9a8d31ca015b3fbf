"""The norm and the MLP of a projector, and whether their parameters can be read directly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.modules.direct_runs import Part, mlp_part
from vlm_fast.modules.fused_sequence import remember_parts, run_parts
from vlm_fast.modules.parameter_access.dtypes import has_other_input
from vlm_fast.modules.parameter_access.norm import (
    NormParameters,
    norm_parameters,
    shuffle_and_norm,
)
from vlm_fast.modules.parameter_access.remembered import recall
from vlm_fast.ops.pixel_shuffle_norm import why_block_too_wide
from vlm_fast.ops.prepared_call import MOST, PreparedCall
from vlm_fast.ops.transforms import in_plain_eager

_STORED = "_normed_mlp"  # where it is stored on the projector


class NormedMLP(NamedTuple):
    """How the norm and the MLP of a projector run.

    Attributes:
        norm: the norm.
        parameters: what `norm_parameters` gives for it.
        parts: the MLP as one `Part`; empty for a projector without one.
        calls: `vlm_fast.ops.norm_mlp` by the arguments of `fused`; None where it cannot serve.
    """

    norm: nn.Module
    parameters: NormParameters | str
    parts: tuple[Part, ...]
    calls: dict[tuple[Any, ...], PreparedCall | None]

    def merged(
        self, owner: str, x: Tensor, factor: int, *, norm_after: bool, height: int = 0,
        width: int = 0, index: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Norm, merge of patches and MLP; as one op if it can serve.

        Args:
            owner: name for fallbacks.
            index: int ``(blocks, factor ** 2)``, the rows of each block, or None.
            others: as in `vlm_fast.ops.norm_mlp`. Without a height and a width the result is
                ``(blocks, features)``.
        """
        if height == 0 and x.ndim != 2:
            x = x.reshape(-1, x.shape[-1])
        if index is None:
            found = self.fused(x, factor, norm_after, height, width)
            if found is not NotImplemented:
                return found
        blocks, down, across = x, height, width
        if height == 0:
            blocks, down, across = x.reshape(-1, factor**2, x.shape[-1]), factor, factor
        y = shuffle_and_norm(
            owner, blocks, self.norm, self.parameters, height=down, width=across, factor=factor,
            norm_after=norm_after, index=index,
        )  # fmt: skip
        return self.mlp(owner, y if height else y.flatten(0, -2))

    def fused(
        self, x: Tensor, factor: int, norm_after: bool, height: int = 0, width: int = 0
    ) -> Any:
        """`vlm_fast.ops.norm_mlp` if it is known to serve this input; else NotImplemented."""
        if torch.compiler.is_compiling() or not in_plain_eager() or has_other_input():
            return NotImplemented
        norm, direct = self.parameters, self.parts[0].direct
        if isinstance(norm, str) or direct is None:
            return NotImplemented
        key = (x.shape[-1], factor, norm_after, height, width)
        call = self.calls[key] if key in self.calls else self._prepare(key, x)
        if call is None:
            return NotImplemented
        return call.in_plain_eager((x, norm.weight, norm.bias, *direct.parameters))

    def _prepare(self, key: tuple[Any, ...], x: Tensor) -> PreparedCall | None:
        _, factor, norm_after, height, width = key
        direct, norm = self.parts[0].direct, self.parameters
        call = None
        if (
            direct is not None
            and isinstance(norm, NormParameters)
            and norm.weight.dtype is direct.dtype
            and why_block_too_wide(x, factor) is None
        ):
            call = ops.norm_mlp.prepared(
                height=height, width=width, factor=factor, norm_after=norm_after,
                norm=norm.kind, eps=norm.eps, **direct.options,
            )  # fmt: skip
        if len(self.calls) >= MOST:
            self.calls.clear()
        self.calls[key] = call
        return call

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
    found = NormedMLP(norm, norm_parameters(norm), parts, {})
    if isinstance(found.parameters, NormParameters):
        remember_parts(owner, _STORED, found, parts, norm, *others)
    return found
