"""`TokenBudget`: reduce tokens to a fixed number by pooling, merging or resampling."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.modules.perceiver_resampler import PerceiverResampler
from vlm_fast.modules.token_grid import grid_of
from vlm_fast.modules.token_merger import TokenMerger
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_value
from vlm_fast.ops.spatial_pool import MAX_STRIDE

OP = "TokenBudget"
METHODS = ("pool", "merge", "resample")


class TokenBudget(nn.Module):
    """Reduce the tokens before or after a projector to n tokens.

    Args:
        n: number of output tokens; with "pool" and "merge" fewer if the input has fewer.
        method: "pool" averages over cells of the grid that the tokens form; "merge" merges similar
            tokens (`TokenMerger`); "resample" lets n learned queries attend to all tokens
            (`PerceiverResampler`).
        dim: width of the tokens, for "resample".
        resampler: arguments of the `PerceiverResampler`, which has one layer by default.

    Raises:
        TypeError: "resample" without dim, or dim or resampler arguments with another method.
        ValueError: n is below 1, or the method is unknown.
    """

    def __init__(
        self, n: int, method: str = "pool", *, dim: int | None = None, **resampler: Any
    ) -> None:
        super().__init__()
        if n < 1:
            raise wrong_value(OP, "n", n, "1 or more")
        if method not in METHODS:
            raise wrong_value(OP, "method", method, f"one of {METHODS}")
        if (method == "resample") != (dim is not None) or (resampler and dim is None):
            raise TypeError(f"vlm_fast.{OP}: dim is {dim}, expected with method 'resample' alone")
        self.n, self.method = n, method
        if method == "merge":
            self.merger = TokenMerger(keep=n)
        if dim is not None:
            self.resampler = PerceiverResampler(dim=dim, num_latents=n, **{"depth": 1, **resampler})

    def extra_repr(self) -> str:
        return f"{self.n}, method={self.method!r}"

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Reduce ``x (batch, tokens, features)`` to ``(batch, n, features)``.

        Args:
            x: the tokens; for "pool" row by row of the grid, without a CLS token or registers.
            grid: rows and columns, for "pool"; a square by default.

        Raises:
            TypeError: x is not a tensor.
            ValueError: x does not have three dimensions; the tokens form no square and no grid is
                given, or a grid of another size; or no rectangle of n cells fits into the grid.
        """
        if not isinstance(x, Tensor):
            raise not_a_tensor(OP, "x", x)
        if x.ndim != 3:
            raise wrong_value(OP, "x", x, "(batch, tokens, features)")
        if self.method == "merge":
            return self.merger(x)
        if self.method == "resample":
            return self.resampler(x[:, None, None])[:, 0]
        if x.shape[1] <= self.n:
            return x
        side, _ = grid_of(OP, x)
        if grid is None:
            if side * side != x.shape[1]:
                wanted = f"a square of tokens, or their grid as an argument; {side}**2 is nearest"
                raise wrong_value(OP, "x", x, f"{wanted} (without a CLS token and registers)")
            grid = (side, side)
        if grid[0] * grid[1] != x.shape[1]:
            raise wrong_value(OP, "grid", grid, f"two sizes whose product is {x.shape[1]}, tokens")
        cells = pooled_grid(self.n, grid)
        stride = grid[0] // cells[0]
        if grid == (cells[0] * stride, cells[1] * stride) and stride <= MAX_STRIDE:
            return ops.spatial_pool(x, height=grid[0], width=grid[1], stride=stride)
        # Rows of tokens are an image with channels last: no copy.
        image = x.transpose(1, 2).unflatten(2, grid)
        pooled = F.adaptive_avg_pool2d(image, cells)
        return pooled.flatten(2).transpose(1, 2)


def pooled_grid(n: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of n cells, at most those of ``grid``, with the nearest aspect ratio.

    Raises:
        ValueError: no rectangle of n cells fits into the grid.
    """
    fitting = [(h, n // h) for h in range(1, grid[0] + 1) if n % h == 0 and n // h <= grid[1]]
    if not fitting:
        raise wrong_value(OP, "n", n, f"a product of two sizes of at most {grid}, the grid")
    return min(fitting, key=lambda cells: abs(math.log(cells[0] * grid[1] / cells[1] / grid[0])))
