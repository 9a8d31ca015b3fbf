"""``pack_image_features`` of the models whose images come in tiles: LLaVA-NeXT and its relatives.

All images are packed in one movement from what the projector wrote. The list that the method
returns is of views; the ``cat`` that the model's forward makes of it is then no copy.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from fractions import Fraction
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vlm_fast.fallback import record_fallback
from vlm_fast.modules.anyres_packer import joined, pack_tiles
from vlm_fast.ops.anyres_plan import Plan, plan
from vlm_fast.ops.anyres_tiling import Tiling, sizes_of
from vlm_fast.patching.class_swap import PatchedModule, is_class
from vlm_fast.patching.models import image_token_merge
from vlm_fast.patching.models.image_token_merge import FusedMerge
from vlm_fast.patching.placeholder_masks import MaskSpec

CLASSES = (
    ("llava_next", "LlavaNextModel"),
    ("llava_next_video", "LlavaNextVideoModel"),
    ("llava_onevision", "LlavaOnevisionModel"),
    ("granite4_vision", "Granite4VisionModel"),
)
NAME = "pack_image_features"  # in fallbacks

# Functions that see the tiles, newline and plan of every pack; `vlm_fast.verify` looks through one.
OBSERVERS: list[Callable[[Tensor, Tensor | None, Plan], None]] = []


class PackedImage(Tensor):
    """The rows of one image, a view of all images' rows; ``cat`` of all of them is the latter."""

    whole: Tensor
    place: tuple[int, int]  # which one, of how many

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.cat and (kwargs or {}).get("dim", 0) == 0 and len(args) == 1:
                parts = args[0]
                whole = getattr(parts[0], "whole", None)
                places = [(i, len(parts)) for i in range(len(parts))]
                if whole is not None and all(
                    getattr(part, "whole", None) is whole and part.place == place
                    for part, place in zip(parts, places, strict=True)
                ):
                    return whole
            return func(*args, **(kwargs or {}))

    def unmark(self) -> None:
        """Make this very object a plain tensor, wherever it is kept."""
        del self.whole, self.place
        self.__class__ = Tensor  # type: ignore[assignment]


class Answer(NamedTuple):
    """What a ``pack_image_features`` returns, beside its images.

    Attributes:
        counts: whether it also returns how many rows each image has.
        flat: whether an image of a single tile has one dimension.
    """

    counts: bool
    flat: bool


# The images that are packed while a model merges what it packs.
_merging: ContextVar[list[PackedImage] | None] = ContextVar("merging", default=None)


class FusedAnyRes(PatchedModule):
    """A model whose tiles are packed in one movement."""

    handles_children = False
    mirrored_methods: ClassVar[tuple[str, ...]] = ("pack_image_features",)
    answer: ClassVar[Answer]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "patch_spec" in vars(cls):  # a class that was made for a model
            base: Any = cls.patch_spec.base
            cls.answer = _answer(base.pack_image_features)

    @classmethod
    def why_partly_patched(cls, module: nn.Module) -> str | None:
        found = image_token_merge.recognise(module)
        return found if isinstance(found, str) else None

    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # Every later question about a size is then answered without the device: one transfer.
        if isinstance(image_sizes, Tensor):
            image_sizes = image_sizes.cpu()
        if not torch.compiler.is_compiling():
            sizes_of(image_sizes)  # says what is wrong with them, where a division would not
        return super().get_image_features(  # type: ignore[misc]
            pixel_values, image_sizes, *args, **kwargs
        )

    def pack_image_features(
        self, image_features: Sequence[Tensor], image_sizes: Any, *args: Any, **kwargs: Any
    ) -> Any:
        original = super().pack_image_features  # type: ignore[misc]
        named = inspect.signature(original).bind(image_features, image_sizes, *args, **kwargs)
        named.apply_defaults()
        newline = named.arguments["image_newline"]
        tiling = _tiling(self, newline is not None, named.arguments)
        reason = tiling if isinstance(tiling, str) else _mismatch(image_features, tiling)
        if self.answer.flat and any(len(tiles) == 1 for tiles in image_features):
            reason = "an image of a single tile has one dimension in this release"
        if isinstance(tiling, str) or reason is not None:
            record_fallback(NAME, str(reason))
            return original(image_features, image_sizes, *args, **kwargs)
        pack = torch.compiler.disable(_pack) if torch.compiler.is_compiling() else _pack
        whole, counts = pack(image_features, image_sizes, newline, tiling)
        marked = _merging.get() if not torch.compiler.is_compiling() else None
        images = list(whole.split(counts)) if marked is None else _images(whole, counts)
        if marked is not None:
            marked += images
        if not self.answer.counts:
            return images
        return images, torch.tensor(counts, dtype=torch.long, device=whole.device)


class FusedAnyResMerge(FusedAnyRes, FusedMerge):
    """A model whose tiles are packed in one movement and merged in another."""

    mirrored_methods: ClassVar[tuple[str, ...]] = FusedAnyRes.mirrored_methods

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not hasattr(cls, "patch_spec"):  # another mixin, not yet a class of models
            return
        base = cls.patch_spec.base

        @functools.wraps(base.forward)  # callers ask for its signature
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return base.forward(self, *args, **kwargs)
            images: list[PackedImage] = []
            before = _merging.set(images)
            try:
                return base.forward(self, *args, **kwargs)
            finally:
                _merging.reset(before)
                for image in images:  # outputs may hold them
                    image.unmark()

        cls.forward = forward  # type: ignore[attr-defined]


def recognise(module: nn.Module) -> MaskSpec | str | None:
    """A recipe for a model that packs tiles and merges them itself, a reason against, or None."""
    found = image_token_merge.recognise(module) if packs(module) else None
    return why_not_packed(module) or found if isinstance(found, MaskSpec) else None


def recognise_packing(module: nn.Module) -> tuple[()] | str | None:
    """The same for a model that packs tiles and whose merge is not served."""
    return why_not_packed(module) or () if packs(module) and recognise(module) is None else None


def packs(module: nn.Module) -> bool:
    return any(is_class(module, family, name) for family, name in CLASSES)


def why_not_packed(module: nn.Module) -> str | None:
    """Why what a model's own packing returns is not known, or None."""
    try:
        _answer(type(module).pack_image_features)  # type: ignore[attr-defined]
    except Exception as error:  # of code that nobody here has read
        return f"pack_image_features cannot be asked: {type(error).__name__}: {error}"
    return None


def _answer(method: Any) -> Answer:
    """What a ``pack_image_features`` returns. It is asked about one tile of one row.

    Raises:
        ValueError: it returns something else.
        Exception: whatever the method raises.
    """
    tile = torch.arange(2.0, device="cpu")
    known = {"vision_feature_select_strategy": "full"}
    named = {name: known[name] for name in inspect.signature(method).parameters if name in known}
    found = method(SimpleNamespace(), [tile.view(1, 1, 2)], [[1, 1]], **named)
    images, *counts = found if isinstance(found, tuple) else (found,)
    listed = type(images) is list and len(images) == 1
    for flat, image in ((False, tile[None]), (True, tile)):
        counted = [count.tolist() for count in counts] in ([], [[len(image)]])
        if listed and counted and torch.equal(images[0], image):
            return Answer(bool(counts), flat)
    raise ValueError("it returns neither a list of images nor that and their rows")


def _tiling(model: Any, newline: bool, options: dict[str, Any]) -> Tiling | str:
    """How the model tiles its images, or why that is not known here."""
    config, vision = model.config, model.config.vision_config
    if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
        return "its tiles are not square"
    side = vision.image_size // vision.patch_size
    if getattr(model, "layerwise_projectors", None) is not None:  # Granite's tokens are fewer
        side = int(side * Fraction(model.downsample_rate))
    max_tiles = None
    if "vision_aspect_ratio" in options:
        number = str(options["vision_aspect_ratio"]).removeprefix("anyres_max_")
        if not number.isdigit():
            return f"vision_aspect_ratio is {options['vision_aspect_ratio']!r}, not anyres_max_N"
        max_tiles = int(number)
    return Tiling(config.image_grid_pinpoints, vision.image_size, side, max_tiles, newline)


def _mismatch(image_features: Sequence[Tensor], tiling: Tiling) -> str | None:
    """Why these tiles cannot be packed by a plan, or None."""
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
    """All images' rows, and how many each has."""
    tiles = [features.shape[0] for features in image_features]
    sizes = sizes_of(image_sizes[: len(tiles)])
    device = image_features[0].device
    made = plan(sizes, tiling, tiles=tiles, device=device)
    newline = None if newline is None else newline.to(device)
    whole = joined(image_features)
    for observe in OBSERVERS:
        observe(whole, newline, made)
    return pack_tiles(whole, newline, made), list(made.counts)


def _images(whole: Tensor, counts: Sequence[int]) -> list[PackedImage]:
    images: list[PackedImage] = []
    for i, start in enumerate(accumulate(counts[:-1], initial=0)):
        image = whole.narrow(0, start, counts[i]).as_subclass(PackedImage)
        image.whole, image.place = whole, (i, len(counts))
        images.append(image)
    return images
