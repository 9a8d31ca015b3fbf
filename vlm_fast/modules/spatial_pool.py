"""Pooling of the grid of tokens that a vision tower leaves, as a module."""

from __future__ import annotations

from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.modules.token_grid import grid_of


class SpatialPool(nn.Module):
    """`vlm_fast.ops.spatial_pool` of square grids, or of those that the call names.

    Args:
        stride: how many times fewer rows and columns.
        mode: "avg", "max" or "bilinear".

    Shapes: ``(batch, height * width, features)`` to ``(batch, pooled, features)``.

    Raises:
        ValueError: by the call, as of the op.
    """

    def __init__(self, stride: int = 2, mode: str = "avg") -> None:
        super().__init__()
        self.stride, self.mode = stride, mode

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        height, width = grid_of(type(self).__name__, x, height, width)
        return ops.spatial_pool(x, height=height, width=width, mode=self.mode, stride=self.stride)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, mode={self.mode!r}"
