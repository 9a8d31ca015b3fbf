"""`SpatialPool`: pooling of the grid of tokens that a vision encoder returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.modules.parameter_access.module_calls import why_call_does_more
from vlm_fast.modules.token_grid import grid_of

# Modes of the pooling layers that pool in windows.
WINDOWS: dict[type[nn.Module], str] = {nn.AvgPool2d: "avg", nn.MaxPool2d: "max"}


class SpatialPool(nn.Module):
    """Pool a grid of tokens by `vlm_fast.ops.spatial_pool`; it has no parameters.

    Args:
        stride: factor by which rows and columns become fewer.
        mode: "avg", "max" or "bilinear".
    """

    def __init__(self, stride: int = 2, mode: str = "avg") -> None:
        super().__init__()
        self.stride, self.mode = stride, mode

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Pool ``x (batch, height * width, features)`` to ``(batch, pooled, features)``.

        Args:
            x: row by row of the grid.
            height, width: of the grid, in tokens; that of a square by default.

        Raises:
            TypeError, ValueError: as `vlm_fast.ops.spatial_pool`; or x comes from a `TokenMerger`.
        """
        height, width = grid_of(type(self).__name__, x, height, width)
        return ops.spatial_pool(x, height=height, width=width, mode=self.mode, stride=self.stride)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, mode={self.mode!r}"


def why_not_window(pool: Any, stride: Any) -> str | None:
    """Why a pooling layer does not pool adjacent square windows of this stride, or None."""
    if type(pool) not in WINDOWS:
        return f"{type(pool).__name__} is not one of {', '.join(w.__name__ for w in WINDOWS)}"
    if not isinstance(stride, int) or not (pool.kernel_size == pool.stride == stride):
        return "its windows overlap, or are not square"
    if pool.padding or pool.ceil_mode or getattr(pool, "dilation", 1) != 1 or stride > 8:
        return "its windows are not those of a plain stride"
    return why_call_does_more(pool)
