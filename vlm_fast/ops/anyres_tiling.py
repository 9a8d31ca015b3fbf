"""The tiles and the number of tokens of an image of any resolution (LLaVA-NeXT and OneVision)."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Tiling:
    """How a model cuts its images into tiles.

    Attributes:
        pinpoints: The resolutions (height, width) to choose from, in pixels: the config's
            ``image_grid_pinpoints``.
        tile: The side of a tile in pixels, ``vision_config.image_size``.
        side: The side of a tile in tokens, ``image_size // patch_size``.
        max_tiles: N of LLaVA-OneVision's ``anyres_max_N``. A stitched grid of more than 1.21 N
            tiles of tokens is resized to about N tiles. None means that no grid is resized.
        newline: Whether a newline follows each row of the stitched grid, and the tile of an image
            that has only one.

    Raises:
        ValueError: There is no pinpoint, or a number is not positive.
    """

    pinpoints: tuple[Size, ...]
    tile: int
    side: int
    max_tiles: int | None = None
    newline: bool = True

    def __post_init__(self) -> None:
        pinpoints = tuple((int(h), int(w)) for h, w in self.pinpoints)
        object.__setattr__(self, "pinpoints", pinpoints)
        numbers = [self.tile, self.side, *(n for pair in pinpoints for n in pair)]
        numbers += [] if self.max_tiles is None else [self.max_tiles]
        if not pinpoints or min(numbers) <= 0:
            raise ValueError(f"vlm_fast.anyres: {self}, expected pinpoints, all numbers positive")


class Stitched(NamedTuple):
    """The grid of an image's tiles: which tokens are kept, and the size that they are resized to.

    Attributes:
        tiles: Rows and columns of tiles.
        top: Rows of tokens that are cut off above the image (and below it).
        left: Columns of tokens that are cut off on the left (and on the right).
        kept: Rows and columns of tokens that are kept.
        resized: Rows and columns after the resize; ``kept`` if there is none.
    """

    tiles: Size
    top: int
    left: int
    kept: Size
    resized: Size


def sizes_of(image_sizes: Any) -> tuple[Size, ...]:
    """The (height, width) of each image as Python ints.

    Args:
        image_sizes: ``(images, 2)``: a tensor, an array, or a sequence of pairs of numbers, tensors
            or arrays. A tensor on a GPU is copied to the host once.

    Raises:
        TypeError: ``image_sizes`` does not hold pairs of whole numbers.
        ValueError: A size is not positive.
    """
    if isinstance(image_sizes, Tensor):
        image_sizes = image_sizes.cpu()
    pairs = image_sizes.tolist() if hasattr(image_sizes, "tolist") else image_sizes
    try:
        pairs = [p.tolist() if hasattr(p, "tolist") else p for p in pairs]
        sizes = tuple((_whole(h), _whole(w)) for h, w in pairs)
    except (TypeError, ValueError):
        raise TypeError(
            f"vlm_fast.anyres: image_sizes is {image_sizes!r}, expected a (height, width) of whole "
            "numbers for each image"
        ) from None
    for size in sizes:
        check_size(size)
    return sizes


def _whole(number: Any) -> int:
    """An int from any whole number; TypeError for others."""
    is_whole = isinstance(number, float) and number.is_integer()
    return int(number) if is_whole else operator.index(number)


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The pinpoint that keeps most of the image's pixels; among equals, the smallest.

    Mirrors transformers' ``select_best_resolution``, operation by operation, because its rounding
    in double precision can lose a pixel of a side that fits exactly, and that decides ties. For an
    image so thin that no pinpoint keeps a pixel, the smallest pinpoint is returned.

    Raises:
        ValueError: A size is not positive.
    """
    check_size(size)
    height, width = size
    pixels = height * width
    best, most, least_area = pinpoints[0], 0, math.inf
    for candidate in pinpoints:
        h, w = candidate
        scale = min(w / width, h / height)
        remaining = min(int(width * scale) * int(height * scale), pixels)
        area = h * w
        if remaining > most or (remaining == most and area < least_area):
            best, most, least_area = candidate, remaining, area
    return best


def tile_count(size: Size, tiling: Tiling) -> int:
    """The number of tiles of an image, including the base tile that shows all of it."""
    height, width = best_resolution(size, tiling.pinpoints)
    return 1 + math.ceil(height / tiling.tile) * math.ceil(width / tiling.tile)


@functools.lru_cache(maxsize=4096)
def stitched(size: Size, tiling: Tiling) -> Stitched:
    """The stitched grid of an image.

    Mirrors transformers' ``unpad_image``, and the resize of ``LlavaOnevisionModel``.
    """
    height, width = best_resolution(size, tiling.pinpoints)
    tiles = height // tiling.tile, width // tiling.tile
    rows, cols = tiles[0] * tiling.side, tiles[1] * tiling.side
    top, left = padding(size, (rows, cols))
    kept = rows - 2 * top, cols - 2 * left
    return Stitched(tiles, top, left, kept, _resized(kept, tiling))


def padding(size: Size, grid: Size) -> Size:
    """Rows of padding above and below an image in its grid of tokens, and columns on each side."""
    height, width = size
    rows, cols = grid
    # transformers scales in double precision and rounds to 7 digits, which gives this quotient.
    if width * rows > cols * height:
        return (rows - height * cols // width) // 2, 0
    return 0, (cols - width * rows // height) // 2


def _resized(kept: Size, tiling: Tiling) -> Size:
    """Rows and columns of the kept grid after LLaVA-OneVision's resize."""
    if tiling.max_tiles is None:
        return kept
    # In double precision, as in transformers, because rounding decides the quotients.
    ratio = math.sqrt(kept[0] * kept[1] / (tiling.max_tiles * tiling.side**2))
    return (int(kept[0] // ratio), int(kept[1] // ratio)) if ratio > 1.1 else kept


def token_count(size: Sequence[int], tiling: Tiling, *, tiles: int | None = None) -> int:
    """The number of tokens of an image: its base tile, its stitched grid and the newlines.

    Args:
        size: (height, width) in pixels, as a pair, a tensor or an array.
        tiling: How the model tiles its images.
        tiles: 1 for an image that has only the base tile, such as one of several images in a prompt
            of LLaVA-OneVision.

    Raises:
        TypeError, ValueError: The size is not valid, see `sizes_of`.
    """
    newline = int(tiling.newline)
    if tiles == 1:
        return tiling.side**2 + newline
    height, width = stitched(sizes_of([size])[0], tiling).resized
    return tiling.side**2 + height * (width + newline)


def check_size(size: Size) -> None:
    """Raise ValueError if a height or width is not positive."""
    if min(size) <= 0:
        raise ValueError(f"vlm_fast.anyres: an image of {size}, expected a positive height, width")
