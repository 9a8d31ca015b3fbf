"""The points that no other point beats in everything."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """The numbers of the Pareto points: of each, none is as small everywhere and smaller somewhere.

    Args:
        points: one sequence a point, each number the better the smaller. Equal points are all on
            the front, or none is.
    """
    return [
        i
        for i, point in enumerate(points)
        if not any(_dominates(other, point) for j, other in enumerate(points) if i != j)
    ]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    no_worse = all(a <= b for a, b in zip(one, other, strict=True))
    return no_worse and any(a < b for a, b in zip(one, other, strict=True))
