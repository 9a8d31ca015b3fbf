"""Pareto-optimal points."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the Pareto-optimal points: those that no other point dominates.

    Args:
        points: one sequence of numbers per point, where smaller is better. Equal points do not
            dominate each other.
    """
    return [
        i
        for i, point in enumerate(points)
        if not any(_dominates(other, point) for j, other in enumerate(points) if i != j)
    ]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether ``one`` is nowhere greater than ``other`` and somewhere smaller."""
    no_worse = all(a <= b for a, b in zip(one, other, strict=True))
    return no_worse and any(a < b for a, b in zip(one, other, strict=True))
