"""The shapes that tests and benchmarks pass to the input builder of an op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def with_batch(shape: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """A copy of a shape with ``batch`` images or rows, which may be 0.

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
