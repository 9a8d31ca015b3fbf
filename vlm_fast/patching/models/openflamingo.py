"""Patch of OpenFlamingo's gated cross-attention blocks, recognised by class name and children."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from vlm_fast.fallback import record_fallback
from vlm_fast.modules.gated_cross_attention import OP, MediaKeyValues, gated_block, why_not_fused
from vlm_fast.modules.parameter_access.activation import activation_name
from vlm_fast.ops.argument_errors import wrong_value
from vlm_fast.patching.patched_module import PatchedModule


class FusedGatedBlock(PatchedModule):
    """Replaces the forward of OpenFlamingo's GatedCrossAttentionBlock.

    No mask of text tokens by latents is formed.
    """

    same_call_signature = True

    def forward(
        self,
        x: Tensor,
        media: Any,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
    ) -> Tensor:
        reason = self.why_not()
        if reason is None:
            return gated_block(self, x, media, media_locations, use_cached_media, None)
        if isinstance(media, MediaKeyValues):
            wanted = f"the media themselves, while the block runs as plain PyTorch ({reason})"
            raise wrong_value(OP, "media", "MediaKeyValues", wanted)
        record_fallback(type(self).__name__, reason)
        options = {"use_cached_media": True} if use_cached_media else {}
        return super().forward(x, media, media_locations, **options)  # type: ignore[misc]

    def why_not(self) -> str | None:
        return why_not_fused(self)


def recognise(module: nn.Module, **options: Any) -> tuple[()] | str | None:
    """Empty settings, a reason not to patch, or None for another class."""
    block: Any = module
    if type(module).__name__ != "GatedCrossAttentionBlock" or type(module).__module__.startswith(
        "vlm_fast."
    ):
        return None
    children = {"norm", "to_q", "to_kv", "to_out"}
    if not (
        {"attn", "ff"} <= dict(module.named_children()).keys()
        and dict(block.attn.named_children()).keys() == children
        and {"heads", "scale", "only_attend_immediate_media"} <= vars(block.attn).keys()
    ):
        return "its children are not those of OpenFlamingo"
    if list(map(type, block.ff)) != [nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear]:
        return "its feed-forward network is not LayerNorm, Linear, GELU, Linear"
    if activation_name(block.ff[2]) is None:
        return "its activation is not one the kernels know"
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    if arguments[:3] != ["x", "media", "media_locations"]:
        return f"its forward takes {arguments}, not x, media, media_locations"
    return ()
