"""Patches of patch mergers: Qwen-VL's and similar ones, and Mistral 3's for images of any size."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, ClassVar

from torch import Tensor, nn

from vlm_fast.fallback import record_fallback
from vlm_fast.modules.fused_sequence import why_not_fused
from vlm_fast.modules.normed_mlp import normed_mlp, recalled_normed_mlp
from vlm_fast.modules.parameter_access.module_calls import why_call_does_more
from vlm_fast.modules.parameter_access.norm import shuffle_and_norm, why_not_direct_norm
from vlm_fast.modules.patch_merger import children_of
from vlm_fast.ops.patch_blocks import rows_of_blocks
from vlm_fast.patching.class_swap import is_class
from vlm_fast.patching.patched_module import PatchedModule

MERGERS = {
    "qwen2_vl": "PatchMerger",
    "qwen2_5_vl": "Qwen2_5_VLPatchMerger",
    "qwen2_5_omni": "Qwen2_5OmniPatchMerger",
    "exaone4_5": "Exaone4_5_PatchMerger",
    "qwen3_vl": "Qwen3VLVisionPatchMerger",
    "qwen3_vl_moe": "Qwen3VLMoeVisionPatchMerger",
    "qwen3_5": "Qwen3_5VisionPatchMerger",
    "qwen3_5_moe": "Qwen3_5MoeVisionPatchMerger",
    "qwen3_omni_moe": "Qwen3OmniMoeVisionPatchMerger",
    "qwen4_exp": "Qwen4ExpVisionPatchMerger",
    "cohere_compass": "CohereCompassVisionPatchMerger",
    "cosmos3_edge": "Cosmos3EdgePatchMerger",
}
UNFOLDING_PROJECTORS = {
    "mistral3": "Mistral3MultiModalProjector",
    "lighton_ocr": "LightOnOcrMultiModalProjector",
}
UNFOLDING_MERGERS = {"mistral3": "Mistral3PatchMerger", "lighton_ocr": "LightOnOcrPatchMerger"}


class FusedPatchMerger(PatchedModule):
    """Replaces the forward of the classes in ``MERGERS``; the settings are ``saved`` of the MLP."""

    same_call_signature = True

    hidden_size: int
    use_postshuffle_norm: ClassVar[bool] = False  # of the classes that have no such attribute

    def remembered_forward(self, x: Any) -> Any:
        parts = recalled_normed_mlp(self)
        if parts is None or type(x) is not Tensor or x.ndim != 2:
            return NotImplemented
        factor = _factor(self.hidden_size, x.shape[-1])
        if factor is None:
            return NotImplemented
        return parts.fused(x, factor, self.use_postshuffle_norm)

    def forward(self, x: Tensor) -> Tensor:
        parts = recalled_normed_mlp(self)
        reason = self._why_parts_called() if parts is None else None
        factor = _factor(self.hidden_size, x.shape[-1])
        if reason is None and x.numel() % self.hidden_size:
            reason = "its patches make no whole blocks"
        if reason is not None or factor is None:
            record_fallback(type(self).__name__, reason or "its blocks are not square")
            return super().forward(x)  # type: ignore[misc]
        parts = parts or normed_mlp(self, children_of, *self.patch_spec.settings)
        return parts.merged(type(self).__name__, x, factor, norm_after=self.use_postshuffle_norm)

    def _why_parts_called(self) -> str | None:
        """Why the MLP must be called as a module, or None."""
        mlp = getattr(self, "mlp", None)
        if mlp is None:
            return None
        if type(mlp) not in (nn.Sequential, nn.ModuleList):
            return f"mlp: {type(mlp).__name__} is not nn.Sequential or nn.ModuleList"
        reason = why_call_does_more(mlp)
        return None if reason is None else f"mlp: {reason}"

    def why_not(self) -> str | None:
        norm, linear_1, act, linear_2 = children_of(self)
        normed = why_not_direct_norm(norm, linear_1)
        return self._why_parts_called() or normed or why_not_fused(linear_1, act, linear_2)


def _factor(merged_features: int, features: int) -> int | None:
    """The side of a block in patches, or None if blocks are not square."""
    # Under torch.jit.trace sizes are tensors, which have int() but no round().
    factor = int((merged_features / max(features, 1)) ** 0.5 + 0.5)
    return factor if factor**2 * features == merged_features else None


class FusedUnfoldingMerger(PatchedModule):
    """Replaces the forward of Mistral3MultiModalProjector and LightOnOcrMultiModalProjector.

    Norm and merge of all images are one pass. The channel is a merged token's slowest index.
    """

    same_call_signature = True

    norm: nn.Module
    patch_merger: Any
    linear_1: nn.Module
    act: nn.Module
    linear_2: nn.Module
    required_attributes: ClassVar[tuple[str, ...]] = tuple(
        f"patch_merger.{name}" for name in ("patch_size", "spatial_merge_size", "merging_layer")
    )

    def forward(self, image_features: Tensor, image_sizes: Any) -> Tensor:
        parts = recalled_normed_mlp(self)
        reason = self._why_parts_called() if parts is None else None
        merger, x = self.patch_merger, image_features
        sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
        grids = [(int(h) // merger.patch_size, int(w) // merger.patch_size) for h, w in sizes]
        if x.ndim != 2 or sum(h * w for h, w in grids) != x.shape[0]:
            reason = "its tokens are not those of the sizes"
        if reason is not None:
            record_fallback(type(self).__name__, reason)
            return super().forward(image_features, image_sizes)  # type: ignore[misc]
        if parts is None:
            (saved,) = self.patch_spec.settings
            parts = normed_mlp(self, _children_of_unfolding, saved, merger)
        factor, name = merger.spatial_merge_size, type(self).__name__
        x = shuffle_and_norm(
            name, x, parts.norm, parts.parameters, factor=factor, norm_after=False,
            layout="channel", index=rows_of_blocks(grids, factor, x.device),
        )  # fmt: skip
        return parts.mlp(name, merger.merging_layer(x))

    def _why_parts_called(self) -> str | None:
        """Why the patch merger must be called as a module, or None."""
        merger = self.patch_merger
        if not any(is_class(merger, family, name) for family, name in UNFOLDING_MERGERS.items()):
            return f"patch_merger: {type(merger).__name__} is not a class whose code was read"
        reason = why_call_does_more(merger)
        return None if reason is None else f"patch_merger: {reason}"

    def why_not(self) -> str | None:
        normed = why_not_direct_norm(self.norm, self.patch_merger.merging_layer)
        fused = why_not_fused(self.linear_1, self.act, self.linear_2)
        return self._why_parts_called() or normed or fused


_children_of_unfolding = attrgetter("norm", "linear_1", "act", "linear_2")


def recognise(module: nn.Module, *, saved: str, **options: Any) -> tuple[str] | str | None:
    """``(saved,)`` of the MLP, a reason not to patch, or None for another class."""
    if not any(is_class(module, family, name) for family, name in MERGERS.items()):
        return None
    if len(children_of(module)) != 4:
        return "its MLP is not linear, activation, linear"
    return (saved,)


def recognise_unfolding(module: nn.Module, *, saved: str, **options: Any) -> tuple[str] | None:
    """``(saved,)`` of the MLP for Mistral 3 and LightOnOCR, or None for another class."""
    known = any(is_class(module, family, name) for family, name in UNFOLDING_PROJECTORS.items())
    return (saved,) if known else None
