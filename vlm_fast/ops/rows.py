"""Tensors of any leading sizes, seen as rows of their last size."""

from __future__ import annotations

import math

from torch import Tensor


def row_count(x: Tensor) -> int:
    """The product of all sizes but the last."""
    return math.prod(x.shape[:-1])  # Size.numel() would fix a dynamic shape


def as_matrix(x: Tensor) -> Tensor:
    """``x`` as ``(rows, features)``, a view where its strides allow one."""
    # The number of rows is not given as -1, which is ambiguous for a tensor without elements.
    return x if x.ndim == 2 else x.reshape(row_count(x), x.shape[-1])


def empty_like_rows(x: Tensor) -> Tensor:
    """A tensor without elements that keeps the leading sizes, dtype and device of ``x``.

    Backward reads them to make the gradient of ``x`` without keeping ``x`` in memory.
    """
    return x.new_empty(*x.shape[:-1], 0)
