"""Patch of ``pack_image_features``: images in tiles (AnyRes), in LLaVA-NeXT and similar models.

All images are packed by one kernel, directly from the output of the projector. The method returns a
list of views. The model's forward concatenates them, which then copies nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from contextvars import ContextVar
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlm_fast.fallback import record_fallback
from vlm_fast.modules.anyres_packer import concatenated, pack_tiles
from vlm_fast.ops.anyres_plan import plan
from vlm_fast.ops.anyres_tiling import Tiling, sizes_of
from vlm_fast.patching.class_swap import is_class
from vlm_fast.patching.models import image_token_merge
from vlm_fast.patching.models.anyres_result import (
    PackedImage,
    PackResult,
    pack_options,
    probe_pack_method,
    split_images,
    why_not_packed,
)
from vlm_fast.patching.models.image_token_merge import FusedMerge
from vlm_fast.patching.patched_module import PatchedModule
from vlm_fast.patching.placeholder_masks import MaskSpec

CLASSES = (
    ("llava_next", "LlavaNextModel"),
    ("llava_next_video", "LlavaNextVideoModel"),
    ("llava_onevision", "LlavaOnevisionModel"),
    ("granite4_vision", "Granite4VisionModel"),
)
NAME = "pack_image_features"  # under which fallbacks are recorded


# The images packed so far inside the forward of a model that also merges them.
_packed_images: ContextVar[list[PackedImage] | None] = ContextVar("packed_images", default=None)


class FusedAnyRes(PatchedModule):
    """Replaces ``pack_image_features`` of a model: all tiles are packed by one kernel."""

    handles_children = False
    mirrored_methods: ClassVar[tuple[str, ...]] = ("pack_image_features",)
    pack_result: ClassVar[PackResult]
    pack_signature: ClassVar[inspect.Signature]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "patch_spec" in vars(cls):  # a swapped class
            base: Any = cls.patch_spec.base
            cls.pack_result = probe_pack_method(base.pack_image_features)
            cls.pack_signature = inspect.signature(base.pack_image_features)

    @classmethod
    def why_partly_patched(cls, module: nn.Module) -> str | None:
        found = image_token_merge.recognise(module)
        return found if isinstance(found, str) else None

    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # One transfer; later reads of a size do not wait for the device.
        if isinstance(image_sizes, Tensor):
            image_sizes = image_sizes.cpu()
        if not torch.compiler.is_compiling():
            sizes_of(image_sizes)  # raises a clear error for wrong sizes
        return super().get_image_features(  # type: ignore[misc]
            pixel_values, image_sizes, *args, **kwargs
        )

    def pack_image_features(
        self, image_features: Sequence[Tensor], image_sizes: Any, *args: Any, **kwargs: Any
    ) -> Any:
        original = super().pack_image_features  # type: ignore[misc]
        options = pack_options(self.pack_signature, args, kwargs)
        newline = options["image_newline"]
        tiling = _tiling(self, newline is not None, options)
        reason = tiling if isinstance(tiling, str) else _mismatch(image_features, tiling)
        if self.pack_result.flat and any(len(tiles) == 1 for tiles in image_features):
            reason = "an image of a single tile has one dimension in this release"
        if isinstance(tiling, str) or reason is not None:
            record_fallback(NAME, str(reason))
            return original(image_features, image_sizes, *args, **kwargs)
        pack = torch.compiler.disable(_pack) if torch.compiler.is_compiling() else _pack
        whole, counts = pack(image_features, image_sizes, newline, tiling)
        packed = _packed_images.get() if not torch.compiler.is_compiling() else None
        images = list(whole.split(counts)) if packed is None else split_images(whole, counts)
        if packed is not None:
            packed += images
        if not self.pack_result.counts:
            return images
        return images, torch.tensor(counts, dtype=torch.long, device=whole.device)


class FusedAnyResMerge(FusedAnyRes, FusedMerge):
    """`FusedAnyRes` for a model whose merge of image tokens is one op too (`FusedMerge`)."""

    mirrored_methods: ClassVar[tuple[str, ...]] = FusedAnyRes.mirrored_methods

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not hasattr(cls, "patch_spec"):  # a further mixin, not a swapped class
            return
        base = cls.patch_spec.base

        @functools.wraps(base.forward)  # transformers inspects its signature
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return base.forward(self, *args, **kwargs)
            images: list[PackedImage] = []
            before = _packed_images.set(images)
            try:
                return base.forward(self, *args, **kwargs)
            finally:
                _packed_images.reset(before)
                for image in images:  # the outputs may contain them
                    image.to_plain_tensor()

        cls.forward = forward  # type: ignore[attr-defined]


def recognise(module: nn.Module) -> MaskSpec | str | None:
    """The `MaskSpec` of a model that packs tiles and merges them, a reason against, or None."""
    found = image_token_merge.recognise(module) if is_anyres_model(module) else None
    return why_not_packed(module) or found if isinstance(found, MaskSpec) else None


def recognise_packing(module: nn.Module) -> tuple[()] | str | None:
    """Empty settings for a model that packs tiles but whose merge is not patched, else None.

    A reason if its packing is unknown.
    """
    if not is_anyres_model(module) or recognise(module) is not None:
        return None
    return why_not_packed(module) or ()


def is_anyres_model(module: nn.Module) -> bool:
    """Whether a model of transformers packs images in tiles."""
    return any(is_class(module, family, name) for family, name in CLASSES)


def _tiling(model: Any, newline: bool, options: dict[str, Any]) -> Tiling | str:
    """The tiling of a model's images, or why it is unknown."""
    config, vision = model.config, model.config.vision_config
    if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
        return "its tiles are not square"
    side = vision.image_size // vision.patch_size
    if getattr(model, "layerwise_projectors", None) is not None:  # Granite has fewer tokens
        side = int(side * Fraction(model.downsample_rate))
    max_tiles = None
    if "vision_aspect_ratio" in options:
        number = str(options["vision_aspect_ratio"]).removeprefix("anyres_max_")
        if not number.isdigit():
            return f"vision_aspect_ratio is {options['vision_aspect_ratio']!r}, not anyres_max_N"
        max_tiles = int(number)
    return Tiling(config.image_grid_pinpoints, vision.image_size, side, max_tiles, newline)


def _mismatch(image_features: Sequence[Tensor], tiling: Tiling) -> str | None:
    """Why these tiles cannot be packed by one kernel, or None."""
    if len(image_features) == 0:
        return "there is no image"
    first = image_features[0]
    for tiles in image_features:
        if tiles.ndim != 3 or tiles.shape[1] != tiling.side**2:
            return f"tiles are of shape {tuple(tiles.shape[1:])}, expected {tiling.side**2} tokens"
        if tiles.shape[2] != first.shape[2] or tiles.dtype != first.dtype:
            return "the tiles of two images differ in width or dtype"
        if tiles.device != first.device:
            return "the tiles of two images are on different devices"
    return None


def _pack(
    image_features: Sequence[Tensor], image_sizes: Any, newline: Tensor | None, tiling: Tiling
) -> tuple[Tensor, list[int]]:
    """The rows of all images, and the number of rows of each."""
    tiles = [features.shape[0] for features in image_features]
    sizes = sizes_of(image_sizes[: len(tiles)])
    device = image_features[0].device
    made = plan(sizes, tiling, tiles=tiles, device=device)
    newline = None if newline is None else newline.to(device)
    return pack_tiles(concatenated(image_features), newline, made), list(made.counts)
