"""Height and width of the grid that a sequence of tokens forms; merged tokens form none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_fast.ops.argument_errors import check_tensor, wrong_value

MERGED = "_vlm_fast_merged"  # attribute of a tensor whose tokens are no longer in grid order


def mark_merged(x: Tensor) -> None:
    """Mark tokens as being in no grid order, so that `grid_of` raises for them."""
    if not torch.compiler.is_compiling():
        setattr(x, MERGED, True)


def grid_of(op: str, x: Tensor, height: Any = None, width: Any = None) -> tuple[Any, Any]:
    """The given height and width, or those of a square of as many tokens as ``x`` has.

    Args:
        op: name for error messages.
        x: ``(batch, tokens, features)``.

    Raises:
        TypeError: x is not a tensor.
        ValueError: x is the output of a `TokenMerger`, which is in no grid order. This is noticed
            in eager mode, if x is that very tensor.
    """
    check_tensor(op, "x", x)
    if not torch.compiler.is_compiling() and getattr(x, MERGED, False):
        wanted = "tokens row by row of a grid; merged ones are in no order, so merge after this"
        raise wrong_value(op, "x", x, wanted)
    if height is None or width is None:
        height = width = side_of_square(x.shape[-2])
    return height, width


def side_of_square(tokens: Any) -> Any:
    """The side of a square of this many tokens, rounded down.

    Not ``math.isqrt``, which breaks the graph of torch.compile for a symbolic size.
    """
    return int(tokens**0.5)
