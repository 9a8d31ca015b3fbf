"""Row numbers of the square blocks of patches in images of several sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rows_of_blocks(
    grids: Sequence[tuple[int, int]], factor: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The index of `pixel_shuffle_norm` for images of several sizes whose tokens follow each other.

    The index is made on the device without a synchronisation.

    Args:
        grids: (height, width) of each image in tokens. Rows and columns that do not fill a block
            are left out.
        factor: Patches along a side of a block.
        device: The device of the index.

    Returns:
        ``(blocks, factor ** 2)``, int64.
    """
    index, first = [torch.empty(0, factor**2, dtype=torch.int64, device=device)], 0
    for height, width in grids:
        rows = torch.arange(first, first + height * width, device=device).view(height, width)
        rows = rows[: height // factor * factor, : width // factor * factor]
        blocks = rows.unflatten(0, (-1, factor)).unflatten(2, (-1, factor)).transpose(1, 2)
        index.append(blocks.reshape(-1, factor**2))
        first += height * width
    return torch.cat(index)
