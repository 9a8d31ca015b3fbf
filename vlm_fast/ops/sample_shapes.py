"""Shapes of an op's arguments, as tests and benchmarks name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def with_batch(shape: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """A shape with another number of images or rows; with 0, none of them.

    That number is the size named ``batch`` (``count`` counts over the whole batch), or the first
    size of ``shape``.

    Raises:
        ValueError: No size is the number of images or rows.
    """
    new = dict(shape)
    if "batch" in shape:
        new["batch"] = batch
        if "count" in shape:
            new["count"] = shape["count"] // shape["batch"] * batch
    elif "shape" in shape:
        new["shape"] = (batch, *shape["shape"][1:])
    else:
        raise ValueError(f"which of {list(shape)} is the number of images or rows?")
    return new
