"""The grid that a row of tokens is taken for: the square, where nobody says which grid it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_fast.ops.argument_errors import check_tensor, wrong_value

MERGED = "_vlm_fast_merged"  # on tokens that were merged and are no grid any more


def mark_merged(x: Tensor) -> None:
    """Say of these tokens that they are in no order; `grid_of` refuses them."""
    if not torch.compiler.is_compiling():
        setattr(x, MERGED, True)


def grid_of(op: str, x: Tensor, height: Any = None, width: Any = None) -> tuple[Any, Any]:
    """The height and width that were given, or else those of the square.

    Raises:
        TypeError: x is no tensor.
        ValueError: a `TokenMerger` left these tokens, in no order. Seen where x is its output as it
            came, in eager mode.
    """
    check_tensor(op, "x", x)
    if not torch.compiler.is_compiling() and getattr(x, MERGED, False):
        wanted = "tokens row by row of a grid; merged ones are in no order, so merge after this"
        raise wrong_value(op, "x", x, wanted)
    if height is None or width is None:
        height = width = side_of_square(x.shape[-2])
    return height, width


def side_of_square(tokens: Any) -> Any:
    """The side of a square of so many tokens, rounded down; of a symbolic number a symbolic one.

    ``math.isqrt`` of a symbolic size ends the graph that torch.compile traces.
    """
    return int(tokens**0.5)
