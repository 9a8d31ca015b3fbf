"""Projectors that are exactly ``[norm ->] linear_1 -> act -> linear_2``: see `modules.chain`."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vlm_fast.modules.chain import Chain
from vlm_fast.modules.mlp_projector import fused_mlp, why_not_fused
from vlm_fast.patching.class_swap import Patched
from vlm_fast.policy import fell_back


class FusedMLP(Patched):
    """The forward of such a projector through `vlm_fast.ops.mlp`."""

    alone = True
    restates: ClassVar[tuple[str, ...]] = ()  # its forward was traced

    linear_1: nn.Module
    linear_2: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        chain: Chain = self.patch.recipe
        if len(args) == 1 and not kwargs:
            x: Tensor = args[0]
        elif not args and kwargs.keys() == {chain.argument}:
            x = kwargs[chain.argument]
        else:
            fell_back(type(self).__name__, "called with arguments the patch does not know")
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        for name in chain.before:
            x = getattr(self, name)(x)
        act = getattr(self, chain.act)
        return fused_mlp(type(self).__name__, x, self.linear_1, act, self.linear_2, chain.saved)

    def why_not(self) -> str | None:
        return why_not_fused(self.linear_1, getattr(self, self.patch.recipe.act), self.linear_2)
