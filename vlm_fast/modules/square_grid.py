"""The square grid that a row of tokens is taken for, where nobody says which grid it is."""

from __future__ import annotations

from typing import Any


def side_of_square(tokens: Any) -> Any:
    """The side of a square of so many tokens, rounded down; of a symbolic number a symbolic one.

    ``math.isqrt`` of a symbolic size ends the graph that torch.compile traces.
    """
    return int(tokens**0.5)
