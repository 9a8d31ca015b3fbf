"""Patches of projectors that pool a grid: Gemma 3, PerceptionLM, LLaVA-OneVision."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.fallback import record_fallback
from vlm_fast.modules.normed_mlp import normed_mlp, recalled_normed_mlp
from vlm_fast.modules.parameter_access.chain import Chain, find_chain
from vlm_fast.modules.parameter_access.linear import why_not_direct
from vlm_fast.modules.parameter_access.module_calls import (
    why_call_does_more,
    why_no_extra_arguments,
)
from vlm_fast.modules.parameter_access.norm import why_not_direct_norm
from vlm_fast.modules.parameter_access.remembered import ask_once
from vlm_fast.modules.pooled_projector import norm_of, pooled_mlp, pooled_norm, times_matrix
from vlm_fast.modules.spatial_pool import why_not_window
from vlm_fast.modules.token_grid import side_of_square
from vlm_fast.patching.class_swap import is_class
from vlm_fast.patching.models import anyres
from vlm_fast.patching.models.anyres import FusedAnyResMerge
from vlm_fast.patching.models.mlp import FusedMLP
from vlm_fast.patching.patched_module import PatchedModule
from vlm_fast.patching.placeholder_masks import MaskSpec


class FusedPooledNorm(PatchedModule):
    """Replaces the forward of Gemma3MultiModalProjector and T5Gemma2MultiModalProjector.

    Tokens are pooled in rows, without the copies with channels first; the norm is one pass.
    """

    same_call_signature = True

    avg_pool: nn.AvgPool2d
    patches_per_image: int
    kernel_size: int
    mm_soft_emb_norm: nn.Module
    mm_input_projection_weight: Tensor

    def forward(self, vision_outputs: Tensor) -> Tensor:
        x, side, name = vision_outputs, self.patches_per_image, type(self).__name__
        parts = recalled_normed_mlp(self)
        reason = self._why_not_pooled() if parts is None else None
        if x.ndim != 3 or x.shape[1] != side**2:
            reason = "its tokens are no grid of the size that its config says"
        if reason is not None:
            record_fallback(name, reason)
            return super().forward(x)  # type: ignore[misc]
        if parts is None:
            parts = normed_mlp(self, norm_of, "preactivation", self.avg_pool)
        x = pooled_norm(self, x, side, side, self.kernel_size, parts)
        return times_matrix(x, self.mm_input_projection_weight).type_as(vision_outputs)

    def _why_not_pooled(self) -> str | None:
        return why_not_window(self.avg_pool, self.kernel_size)

    def why_not(self) -> str | None:
        return self._why_not_pooled() or why_not_direct_norm(self.mm_soft_emb_norm)


class FusedPooledMLP(PatchedModule):
    """Replaces the forward of PerceptionLMMultiModalProjector: pools before ``linear_2``.

    Means commute with a linear and its bias. At a pooling ratio of 2 ``linear_2`` then multiplies a
    quarter of the rows.
    """

    same_call_signature = True

    linear_1: nn.Module
    gelu: nn.Module
    linear_2: nn.Module
    pooling: Any

    def forward(self, features: Tensor) -> Any:
        reason = self.why_not()
        ratio = getattr(self.pooling, "pooling_ratio", 1)
        side = side_of_square(features.shape[1]) if features.ndim == 3 else 0
        if side < 1 or side**2 != features.shape[1] or side % ratio:
            reason = "its grid is not a square that the ratio divides"
        if reason is not None:
            record_fallback(type(self).__name__, reason)
            return super().forward(features)  # type: ignore[misc]
        return pooled_mlp(
            features, self.linear_1, self.gelu, self.linear_2,
            height=side, width=side, stride=ratio,
        )  # fmt: skip

    def why_not(self) -> str | None:
        return ask_once(self, self._why_not, lambda: (self.pooling, self.linear_2))

    def _why_not(self) -> str | None:
        # linear_2 gets pooled rows, which is right for a linear map only; pooling is not called.
        known = is_class(self.pooling, "perception_lm", "PerceptionLMAdaptiveAvgPooling")
        if not known and type(self.pooling) is not nn.Identity:
            return f"pooling: {type(self.pooling).__name__} is not a class whose code was read"
        reason = why_call_does_more(self.pooling)
        if reason is not None:
            return f"pooling: {reason}"
        reason = why_not_direct(self.linear_2)
        return None if reason is None else f"linear_2: {reason}"


class FusedFrameProjector(FusedMLP):
    """`FusedMLP` for LLaVA-OneVision's projector, which skips ``linear_2`` for video frames.

    `FusedPooledFrames` calls ``linear_2`` after pooling them.
    """

    linear_1: nn.Module
    act: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if _is_pooled_first() and len(args) == 1 and not kwargs:
            return self.act(self.linear_1(args[0]))
        return super().forward(*args, **kwargs)


class FusedPooledFrames(FusedAnyResMerge):
    """`FusedAnyResMerge` for LlavaOnevisionModel; video frames are resized before ``linear_2``.

    Bilinear weights sum to 1, so resizing commutes with a linear and its bias: ``linear_2`` then
    multiplies 196 rows of a frame instead of 729.
    """

    mirrored_methods: ClassVar[tuple[str, ...]] = (
        *FusedAnyResMerge.mirrored_methods, "get_video_features", "apply_pooling",
    )  # fmt: skip

    config: Any
    multi_modal_projector: Any
    required_attributes: ClassVar[tuple[str, ...]] = (
        "config.vision_config.image_size", "config.vision_config.patch_size",
        "multi_modal_projector.linear_2",
    )  # fmt: skip

    def get_video_features(self, *args: Any, **kwargs: Any) -> Any:
        projector = self.multi_modal_projector
        served = isinstance(projector, FusedFrameProjector) and not torch.compiler.is_compiling()
        if not served or self._why_not_pooled_first() is not None:
            return super().get_video_features(*args, **kwargs)  # type: ignore[misc]
        before = _pooled_first.set(True)
        try:
            return super().get_video_features(*args, **kwargs)  # type: ignore[misc]
        finally:
            _pooled_first.reset(before)

    def _why_not_pooled_first(self) -> str | None:
        """Why ``linear_2`` and the projector must be called with all rows, or None."""
        projector = self.multi_modal_projector

        def why_not() -> str | None:
            return (
                why_not_direct(projector.linear_2)
                or projector.why_not()
                or why_no_extra_arguments(projector)
            )

        return ask_once(self, why_not, projector.modules, "_asked_of_projector")

    def apply_pooling(self, image_features: Tensor) -> Any:
        x, vision = image_features, self.config.vision_config
        side = vision.image_size // vision.patch_size
        if x.ndim != 3 or x.shape[1] != side**2:
            record_fallback(
                type(self).__name__, "its tokens are no grid of the size its config says"
            )
            pooled = super().apply_pooling(x)  # type: ignore[misc]
        else:
            pooled = ops.spatial_pool(x, height=side, width=side, mode="bilinear")
        return self.multi_modal_projector.linear_2(pooled) if _is_pooled_first() else pooled


_pooled_first: ContextVar[bool] = ContextVar("pooled_first", default=False)


def _is_pooled_first() -> bool:
    return not torch.compiler.is_compiling() and _pooled_first.get()


def recognise_gemma3(module: nn.Module, **options: Any) -> tuple[()] | None:
    """Empty settings, or None for another class."""
    known = is_class(module, "gemma3", "Gemma3MultiModalProjector")
    return () if known or is_class(module, "t5gemma2", "T5Gemma2MultiModalProjector") else None


def recognise_perception_lm(module: nn.Module, **options: Any) -> tuple[()] | str | None:
    """Empty settings, a reason not to patch, or None for another class."""
    if not is_class(module, "perception_lm", "PerceptionLMMultiModalProjector"):
        return None
    ratio = getattr(module.pooling, "pooling_ratio", 1)
    return () if 1 <= ratio <= 8 else f"it pools by {ratio}"


def recognise_onevision(module: nn.Module, **options: Any) -> MaskSpec | str | None:
    """The `MaskSpec` of LlavaOnevisionModel, a reason not to patch, or None for another class."""
    known = is_class(module, "llava_onevision", "LlavaOnevisionModel")
    return anyres.recognise(module) if known else None


def recognise_frame_projector(module: nn.Module, *, saved: str, **options: Any) -> Chain | None:
    """The chain of LLaVA-OneVision's projector; None for another class or another chain."""
    if not is_class(module, "llava_onevision", "LlavaOnevisionMultiModalProjector"):
        return None
    chain = find_chain(module, saved)
    calls = ("linear_1", "act", "linear_2")
    return chain if isinstance(chain, Chain) and chain.calls == calls else None
