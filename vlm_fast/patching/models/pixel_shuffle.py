"""Patches of projectors with a pixel shuffle: Idefics3, SmolVLM, Llama 4."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.fallback import record_fallback
from vlm_fast.modules.token_grid import side_of_square
from vlm_fast.patching.class_swap import is_class
from vlm_fast.patching.patched_module import PatchedModule

CONNECTORS = {
    "idefics3": "Idefics3Connector",
    "smolvlm": "SmolVLMConnector",
    "modernvbert": "ModernVBertConnector",
}


def side_of(x: Tensor, factor: int) -> int | None:
    """The side of the square grid of ``x (batch, tokens, features)``; None if there is none.

    None too if ``factor`` does not divide the side.
    """
    if x.ndim != 3:
        return None
    side = side_of_square(x.shape[1])
    return side if side > 0 and side**2 == x.shape[1] and side % factor == 0 else None


class FusedConnector(PatchedModule):
    """Replaces ``pixel_shuffle`` of Idefics3's, SmolVLM's and ModernVBert's connector."""

    same_call_signature = True
    mirrored_methods: ClassVar[tuple[str, ...]] = ("pixel_shuffle",)

    def pixel_shuffle(self, x: Tensor, *args: int, **kwargs: int) -> Tensor:
        factor = (*args, *kwargs.values(), 2)[0]  # its name differs between classes
        side = side_of(x, factor)
        if side is None:
            record_fallback(type(self).__name__, "its grid is not a square that the factor divides")
            return super().pixel_shuffle(x, *args, **kwargs)  # type: ignore[misc]
        return ops.pixel_shuffle_norm(x, height=side, width=side, factor=factor)


class FusedShuffleMLP(PatchedModule):
    """Replaces the forward of Llama4VisionPixelShuffleMLP: the shuffle is one copy."""

    same_call_signature = True

    pixel_shuffle_ratio: float
    mlp: nn.Module

    def forward(self, encoded_patches: Tensor) -> Any:
        x, factor = encoded_patches, round(1 / self.pixel_shuffle_ratio)
        side = side_of(x, factor)
        if side is None or factor * self.pixel_shuffle_ratio != 1:
            record_fallback(type(self).__name__, "its grid is not a square that the factor divides")
            return super().forward(x)  # type: ignore[misc]
        return self.mlp(ops.pixel_shuffle_norm(x, height=side, width=side, factor=factor))


def recognise_connector(module: nn.Module, **options: Any) -> tuple[()] | None:
    """Empty settings, or None for another class."""
    known = any(is_class(module, family, name) for family, name in CONNECTORS.items())
    return () if known else None


def recognise_llama4(module: nn.Module, **options: Any) -> tuple[()] | None:
    """Empty settings for Llama 4's adapter, or None for another class."""
    return () if is_class(module, "llama4", "Llama4VisionPixelShuffleMLP") else None
