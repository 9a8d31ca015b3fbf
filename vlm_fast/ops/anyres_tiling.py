"""Which tiles an image is cut into, and how many tokens it becomes: arithmetic on the host."""

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
    """How a model tiles its images.

    Attributes:
        pinpoints: the resolutions (height, width) to choose from, in pixels; of the config's
            ``image_grid_pinpoints``.
        tile: side of a tile in pixels, ``vision_config.image_size``.
        side: side of a tile in tokens, ``image_size // patch_size``.
        max_tiles: N of LLaVA-OneVision's ``anyres_max_N``: from 1.21 N tiles of tokens on, the
            stitched grid is resized to N. None: never.
        newline: whether each row of the stitched grid, and a lone tile, ends in a newline.

    Raises:
        ValueError: there is no pinpoint, or a number is not positive.
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
    """The grid of an image's tiles, in tokens: what is kept of it, and what that is resized to."""

    tiles: Size  # rows and columns of tiles
    top: int
    left: int
    kept: Size
    resized: Size  # as kept, if it is not


def sizes_of(image_sizes: Any) -> tuple[Size, ...]:
    """(height, width) of each image, as whole numbers.

    Args:
        image_sizes: ``(images, 2)``, a tensor or array, or a sequence of pairs of any of these. A
            tensor on a GPU costs one transfer, for all images together.

    Raises:
        TypeError: not of pairs of whole numbers.
        ValueError: a size is not positive.
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
    is_whole = isinstance(number, float) and number.is_integer()
    return int(number) if is_whole else operator.index(number)


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The pinpoint on which the most of the image's pixels remain, of these the smallest.

    transformers' ``select_best_resolution``, whose double precision can lose a pixel of a side
    that fits exactly: it decides ties, so it is repeated here, operation by operation. Of an image
    so thin that no pixel remains on any pinpoint it is the smallest of all.

    Raises:
        ValueError: a size is not positive.
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
    """Tiles the tower is given for an image, the base tile included."""
    height, width = best_resolution(size, tiling.pinpoints)
    return 1 + math.ceil(height / tiling.tile) * math.ceil(width / tiling.tile)


@functools.lru_cache(maxsize=4096)
def stitched(size: Size, tiling: Tiling) -> Stitched:
    """The stitched grid of an image: transformers' ``unpad_image``, and OneVision's resize."""
    height, width = best_resolution(size, tiling.pinpoints)
    tiles = height // tiling.tile, width // tiling.tile
    rows, cols = tiles[0] * tiling.side, tiles[1] * tiling.side
    top, left = padding(size, (rows, cols))
    kept = rows - 2 * top, cols - 2 * left
    return Stitched(tiles, top, left, kept, _resized(kept, tiling))


def padding(size: Size, grid: Size) -> Size:
    """Rows of a grid of tokens above and below an image of ``size``, and columns beside it."""
    height, width = size
    rows, cols = grid
    # transformers scales in double precision and rounds to 7 digits: the whole quotient.
    if width * rows > cols * height:
        return (rows - height * cols // width) // 2, 0
    return 0, (cols - width * rows // height) // 2


def _resized(kept: Size, tiling: Tiling) -> Size:
    if tiling.max_tiles is None:
        return kept
    # In double precision, as there: the square root is not whole, and decides what is.
    ratio = math.sqrt(kept[0] * kept[1] / (tiling.max_tiles * tiling.side**2))
    return (int(kept[0] // ratio), int(kept[1] // ratio)) if ratio > 1.1 else kept


def token_count(size: Sequence[int], tiling: Tiling, *, tiles: int | None = None) -> int:
    """Tokens an image becomes: its base tile, and its stitched grid with the newlines.

    Args:
        size: (height, width) in pixels; a pair, a tensor or an array.
        tiling: of the model.
        tiles: 1 for an image that the tower is shown as one tile only (as one of several in a
            prompt of LLaVA-OneVision).

    Raises:
        TypeError, ValueError: as `sizes_of`.
    """
    newline = int(tiling.newline)
    if tiles == 1:
        return tiling.side**2 + newline
    height, width = stitched(sizes_of([size])[0], tiling).resized
    return tiling.side**2 + height * (width + newline)


def check_size(size: Size) -> None:
    if min(size) <= 0:
        raise ValueError(f"vlm_fast.anyres: an image of {size}, expected a positive height, width")
