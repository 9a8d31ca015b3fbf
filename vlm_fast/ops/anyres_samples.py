"""Sample plans for tests of the ops that pack image tiles, and limits of their kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_fast.ops.anyres_plan import MAX_ROWS, plan
from vlm_fast.ops.anyres_tiling import Size, Tiling, tile_count
from vlm_fast.ops.rows import row_count

Sizes = Sequence[Size | None]  # None: an image of one tile


def sample_plan(
    batch: int, side: int, sizes: Sizes, newline: bool, max_tiles: int | None = None
) -> tuple[list[Tensor], tuple[int, ...], int]:
    """A plan of ``batch`` images that take ``sizes``, in tokens, in turn.

    Returns:
        The tables of the plan, the number of packed rows of each image, and the number of tiles.
    """
    pinpoints = tuple((i * side, j * side) for i in range(1, 7) for j in range(1, 7))
    tiling = Tiling(pinpoints, side, side, max_tiles, newline)
    images = [sizes[i % len(sizes)] for i in range(batch)]
    tiles = [1 if size is None else tile_count(size, tiling) for size in images]
    known = [size or (side, side) for size in images]
    made = plan(known, tiling, tiles=tiles, device=torch.get_default_device())
    return [table.clone() for table in made.tables], made.counts, sum(tiles)


def why_not_packed(features: Tensor, table: Tensor) -> str | None:
    """Why no kernel packs ``features`` by ``table``, or None."""
    if max(row_count(features), table.shape[0]) > MAX_ROWS:
        return f"more than {MAX_ROWS} rows"
    if table.numel() == 0 or features.shape[-1] == 0:
        return "no packed rows or no features"
    return None
