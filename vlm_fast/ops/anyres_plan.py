"""Index tables that pack image tiles into token rows; they are made once per grid and cached."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm_fast.kernels._launcher import is_traced
from vlm_fast.ops.anyres_tiling import Size, Stitched, Tiling, best_resolution, stitched, tile_count

ONE = 2**30  # the integer that stands for a weight of 1
MAX_ROWS = 2**31 - 1  # row numbers are int32


class Plan(NamedTuple):
    """The index tables that pack the tiles of a batch of images.

    Attributes:
        counts: The number of packed rows of each image.
        tables: The arguments ``source, target`` of `ops.anyres_pack`. If any image is resized, the
            arguments ``taps, weights, targets, target_weights`` of `ops.anyres_pack_resized`.
    """

    counts: tuple[int, ...]
    tables: tuple[Tensor, ...]

    @property
    def is_resized(self) -> bool:
        """Whether the tables are those of `ops.anyres_pack_resized`."""
        return len(self.tables) == 4


def plan(
    sizes: Iterable[Size],
    tiling: Tiling,
    *,
    tiles: Iterable[int] | None = None,
    device: str | torch.device = "cpu",
) -> Plan:
    """Make the tables for a batch of images whose tiles follow each other.

    The tables of each grid are cached on the host, those of the last few batches on their device.
    A new table for a GPU is copied from the host, so make it outside of CUDA graphs.

    Args:
        sizes: (height, width) of each image in pixels, as `sizes_of` returns them.
        tiling: How the model tiles its images.
        tiles: The number of tiles of each image, 1 or its `tile_count`. None means `tile_count` for
            every image.
        device: The device of the features.

    Raises:
        ValueError: A size is not positive, an image has not the tiles of its grid, a grid has no
            rows or no columns after its resize, or there are more than 2**31 - 1 rows.
    """
    sizes = tuple(sizes)
    counts = tuple([tile_count(size, tiling) for size in sizes] if tiles is None else tiles)
    if len(counts) != len(sizes):
        raise ValueError(f"vlm_fast.anyres: {len(sizes)} sizes, {len(counts)} counts of tiles")
    for size, found in zip(sizes, counts, strict=True):
        if found != 1 and found != 1 + math.prod(stitched(size, tiling).tiles):
            raise ValueError(
                f"vlm_fast.anyres: an image of {size} has {found} tiles, expected the base and "
                f"{stitched(size, tiling).tiles} of {tiling.tile} pixels for its grid of "
                f"{best_resolution(size, tiling.pinpoints)}, or 1"
            )
    grids = tuple(
        None if n == 1 else stitched(size, tiling) for size, n in zip(sizes, counts, strict=True)
    )
    return tables(grids, tiling.side, tiling.newline, torch.device(device))


def _cached(maxsize: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Cache the last ``maxsize`` results. Fake tensors made while tracing are not cached."""

    def decorate(make: Callable[..., Any]) -> Callable[..., Any]:
        cached = functools.lru_cache(maxsize=maxsize)(torch.inference_mode(False)(make))

        @functools.wraps(make)
        def call(*key: Any) -> Any:
            traced = is_traced(torch.empty(0)) or torch.compiler.is_compiling()
            return make(*key) if traced else cached(*key)

        return call

    return decorate


@_cached(8)  # tables of whole batches on a GPU take up to megabytes each
def tables(
    grids: tuple[Stitched | None, ...], side: int, newline: bool, device: torch.device
) -> Plan:
    """The plan of images with these stitched grids; None stands for an image of one tile."""
    resized = any(grid is not None and grid.resized != grid.kept for grid in grids)
    make = _resized_tables if resized else _plain_tables
    found: list[tuple[Tensor, ...]] = [make(grid, side, newline) for grid in grids]
    shifted, counts, first, placed = [], [], 0, 0
    for parts in found:
        forth, back = parts[0], parts[-1] if len(parts) == 2 else parts[2]
        forth, back = _shifted(forth, first), _shifted(back, placed)
        shifted.append((forth, back) if len(parts) == 2 else (forth, parts[1], back, parts[3]))
        counts.append(forth.shape[0])
        first, placed = first + back.shape[0], placed + forth.shape[0]
    if max(first, placed) > MAX_ROWS:
        raise ValueError(f"vlm_fast.anyres: {max(first, placed)} rows, at most {MAX_ROWS}")
    none = (torch.empty(0, dtype=torch.int32, device="cpu"),) * 2
    columns = zip(*(shifted or [none]), strict=True)
    return Plan(tuple(counts), tuple(torch.cat(column).to(device) for column in columns))


def _shifted(rows: Tensor, by: int) -> Tensor:
    """Row numbers increased by ``by``; negative ones, which are no rows, stay."""
    return torch.where(rows < 0, rows, rows + by)


def _stitched_rows(grid: Stitched, side: int) -> Tensor:
    """``(height, width)`` of the kept grid: the row number of each token among all tile rows."""
    y = torch.arange(grid.top, grid.top + grid.kept[0], device="cpu")[:, None]
    x = torch.arange(grid.left, grid.left + grid.kept[1], device="cpu")
    tile = 1 + y // side * grid.tiles[1] + x // side
    return (tile * side + y % side) * side + x % side


@_cached(256)
def _plain_tables(grid: Stitched | None, side: int, newline: bool) -> tuple[Tensor, Tensor]:
    """``source``, which is -1 for newlines, and its inverse, which is -1 for rows cut off."""
    base = torch.arange(side**2, device="cpu")
    if grid is None:
        source = torch.cat([base, base.new_full((int(newline),), -1)])
        return source.int(), base.int()
    rows = _stitched_rows(grid, side)
    marks = rows.new_full((grid.kept[0], int(newline)), -1)
    source = torch.cat([base, torch.cat([rows, marks], 1).flatten()])
    target = base.new_full(((1 + math.prod(grid.tiles)) * side**2,), -1)
    target[: side**2] = base
    target[rows.flatten()] = _positions(grid.kept, side, newline).flatten()
    return source.int(), target.int()


def _positions(size: Size, side: int, newline: bool) -> Tensor:
    """``(height, width)``: the number of the packed row of each token of the grid."""
    height, width = size
    y = torch.arange(height, device="cpu")[:, None]
    return side**2 + y * (width + newline) + torch.arange(width, device="cpu")


@_cached(64)
def _resized_tables(grid: Stitched | None, side: int, newline: bool) -> tuple[Tensor, ...]:
    """Taps and weights of each packed row, then those of the transposed matrix.

    Each row has four taps, padded with -1. A resize only reduces rows and columns, so no token is a
    tap of more than four others.
    """
    if grid is None or grid.resized == grid.kept:
        source, target = _plain_tables(grid, side, newline)
        return *single_taps(source), *single_taps(target)
    if 0 in grid.resized:
        raise ValueError(f"vlm_fast.anyres: nothing is left of a grid of {grid.kept} when resized")
    rows = _stitched_rows(grid, side)
    (y, y_back), (x, x_back) = map(_bilinear, grid.kept, grid.resized)
    taps, weights = _outer(rows, y, x)
    marks = taps.new_full((grid.resized[0], int(newline), 4), -1)
    taps = torch.cat([taps, marks], 1).view(-1, 4)
    weights = torch.cat([weights, torch.zeros_like(marks)], 1).view(-1, 4)
    base, base_weights = single_taps(torch.arange(side**2, device="cpu"))
    rows_of_tiles = (1 + math.prod(grid.tiles)) * side**2
    targets, target_weights = single_taps(base.new_full((rows_of_tiles,), -1))
    targets[: side**2], target_weights[: side**2] = base, base_weights
    back, back_weights = _outer(_positions(grid.resized, side, newline), y_back, x_back)
    targets[rows.flatten()] = back.view(-1, 4).int()
    target_weights[rows.flatten()] = back_weights.view(-1, 4).int()
    return (
        torch.cat([base, taps.int()]), torch.cat([base_weights, weights.int()]),
        targets, target_weights,
    )  # fmt: skip


def single_taps(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Taps and weights of rows that are copied: one tap of weight 1, or none where a row is -1."""
    taps = rows.new_full((rows.shape[0], 4), -1, dtype=torch.int32)
    taps[:, 0] = rows
    weights = torch.zeros_like(taps)
    weights[:, 0] = torch.where(rows < 0, 0, ONE)
    return taps, weights


Axis = tuple[Tensor, Tensor]  # taps (length, 2), padded with -1, and their float64 weights


def _bilinear(length: int, resized: int) -> tuple[Axis, Axis]:
    """Bilinear weights along one axis: a matrix with two taps per row, and its transpose.

    The weights are those of ``interpolate(mode="bilinear", align_corners=False)``, from positions
    that are exact fractions.
    """
    forth: list[tuple[tuple[int, int], tuple[float, float]]] = []
    back: list[dict[int, float]] = [{} for _ in range(length)]
    for i in range(resized):
        position, unit = max((2 * i + 1) * length - resized, 0), 2 * resized
        first = position // unit
        taps = first, min(first + 1, length - 1)
        weight = position % unit / unit
        forth.append((taps, (1 - weight, weight)))
        for tap, w in zip(taps, (1 - weight, weight), strict=True):
            back[tap][i] = back[tap].get(i, 0.0) + w
    padded = [[*b.items(), (-1, 0.0), (-1, 0.0)][:2] for b in back]
    assert all(len(b) <= 2 for b in back)
    table = [list(zip(*pair, strict=True)) for pair in padded]
    return _axis(forth), _axis([(taps, weights) for taps, weights in table])


def _axis(pairs: Sequence[tuple[Any, Any]]) -> Axis:
    """Tensors of taps and weights from one pair ``(taps, weights)`` per token."""
    taps, weights = zip(*pairs, strict=True)
    return (
        torch.tensor(taps, device="cpu"),
        torch.tensor(weights, dtype=torch.float64, device="cpu"),
    )


def _outer(rows: Tensor, y: Axis, x: Axis) -> tuple[Tensor, Tensor]:
    """Taps ``(height, width, 4)`` and weights of a grid, from the taps and weights of its axes."""
    (y_taps, y_weights), (x_taps, x_weights) = y, x
    y_at, x_at = y_taps[:, None, :, None], x_taps[None, :, None, :]
    known = (y_at >= 0) & (x_at >= 0)
    taps = torch.where(known, rows[y_at.clamp(min=0), x_at.clamp(min=0)], -1)
    weights = y_weights[:, None, :, None] * x_weights[None, :, None, :]
    return taps.flatten(2), torch.where(known, (weights * ONE).round().long(), 0).flatten(2)
