"""Patch of MLP projectors: modules that call linear, activation and linear in a row (LLaVA)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vlm_fast.fallback import record_fallback
from vlm_fast.modules.fused_sequence import (
    recalled_parts,
    remembered_run,
    run_parts,
    run_steps,
    why_not_steps,
)
from vlm_fast.modules.parameter_access.chain import Chain, find_chain
from vlm_fast.patching.patched_module import PatchedModule


class FusedMLP(PatchedModule):
    """Replaces the forward of a module that is a `Chain` with linear, activation, linear in a row.

    Examples are LLaVA's projector and an nn.Sequential. Runs `vlm_fast.ops.mlp` and
    `vlm_fast.ops.act_linear`.
    """

    same_call_signature = True
    handles_children = False  # a child may be a chain itself
    mirrored_methods: ClassVar[tuple[str, ...]] = ()  # its forward was traced

    remembered_forward: ClassVar[Any] = staticmethod(remembered_run)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        chain: Chain = self.patch_spec.settings
        x, reason = None, None
        if len(args) == 1 and not kwargs:
            x = args[0]
        elif not args and kwargs.keys() == {chain.argument}:
            x = kwargs[chain.argument]
        else:
            reason = "called with arguments the patch does not know"
        if isinstance(x, Tensor):
            parts = recalled_parts(self)
            if parts is not None:
                return run_parts(type(self).__name__, x, parts)
            reason = chain.why_changed(self)  # type: ignore[arg-type]
        elif reason is None:
            reason = f"its input is a {type(x).__name__}"
        if reason is not None:
            record_fallback(type(self).__name__, reason)
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return run_steps(self, x, lambda: chain.steps(self), chain.saved)  # type: ignore[arg-type]

    def why_not(self) -> str | None:
        chain: Chain = self.patch_spec.settings
        module: Any = self
        return chain.why_changed(module) or why_not_steps(chain.steps(module), chain.saved)


def recognise(
    module: nn.Module, *, saved: str, skip_chains: bool, **options: Any
) -> Chain | str | None:
    """The chain of a module, the reason why it is none, or None for another module.

    ``skip_chains``: return None, because the module belongs to a tower or to a patched module.
    """
    return None if skip_chains else find_chain(module, saved)
