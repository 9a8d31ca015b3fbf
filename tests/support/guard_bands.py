"""Guard bands: tensors lie inside larger buffers, which reveal reads and writes outside them.

Inputs are surrounded by NaN (masks by True), so that a read outside reaches a result (see
`_poison`). Allocations of the code under test are surrounded by 0xFF bytes, which are NaN with
other bits, and are NaN until written.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MARGIN = 1 << 16  # bytes; above the largest tile of a row
PADDINGS = (72, 80, 96)  # elements; another pitch for every tensor, so that none stands for another
LAYOUTS = (
    "dense",
    "padded rows",
    "offset by one",
    "gaps between images",
    "transposed",
    "every other column",
    "expanded",
)


def strides_of(shape: torch.Size, layout: str, padding: int) -> list[int]:
    """Strides of the layout; dense if the layout needs more dimensions than there are."""
    if layout == "transposed" and len(shape) > 1:
        *leading, rows, cols = shape
        strides = strides_of(torch.Size([*leading, cols, rows]), "padded rows", padding)
        return [*strides[:-2], strides[-1], strides[-2]]
    step = 2 if layout == "every other column" else 1
    pitch = step * shape[-1] + (padding if layout in ("padded rows", "expanded") else 0)
    rows = [math.prod(shape[i + 1 : -1]) for i in range(len(shape) - 1)]
    strides = [*(n * pitch for n in rows), step]
    if layout == "gaps between images" and len(shape) > 2:
        strides[0] += pitch
    if layout == "expanded" and len(shape) > 1:
        strides[0] = 0
    return strides


@functools.cache
def _poison(dtype: torch.dtype, device: str) -> float:
    """NaN, or a huge number where plain PyTorch multiplies memory beside a row by zero.

    oneDNN does so with AMX: its bf16 products read past rows that are not a multiple of its tiles.
    A NaN there would reach the result, and a finite number does not.
    """
    if not dtype.is_floating_point:
        return 1
    for rows, width, columns in ((17, 9, 33), (65, 33, 80)):
        wide = torch.full((rows, 2 * width), torch.nan, dtype=dtype, device=device)
        wide[:, :width] = 1
        weight = torch.ones(columns, width, dtype=dtype, device=device)
        if torch.nn.functional.linear(wide[:, :width], weight).isnan().any():
            return 2.0**100
    return torch.nan


class GuardBands(TorchFunctionMode):
    """While active, allocations get guard bands; `check` fails if a band was changed."""

    EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
    ZERO = ("zeros", "zeros_like", "new_zeros")
    PRODUCTS = ("linear", "matmul", "__matmul__", "mm")  # operands of kernels, too

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[tuple[Tensor, Tensor]] = []
        self.outputs: list[tuple[Tensor, int]] = []

    def lay_out(self, value: Any, layout: str, index: int = 0) -> Any:
        """Copy values into the given layout; lists are mapped and None is passed through."""
        if isinstance(value, list):
            return [self.lay_out(v, layout, index + i) for i, v in enumerate(value)]
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        if layout == "expanded" and not value.is_floating_point():
            layout = "dense"  # a mask of equal rows would be another mask
        strides = strides_of(value.shape, layout, PADDINGS[index % len(PADDINGS)])
        extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, strides, strict=True))
        margin = MARGIN // value.element_size()
        poison = _poison(value.dtype, value.device.type)
        # Tensor.new_full would be seen by this mode, if it is active.
        buffer = torch.full(
            (2 * margin + max(extent, 0),), poison, dtype=value.dtype, device=value.device
        )
        at = margin + (layout == "offset by one")
        if 0 in strides and value.shape[0] > 1:
            value = value[:1].expand_as(value)
            buffer.as_strided((1, *value.shape[1:]), strides, at).copy_(value[:1])
        else:
            buffer.as_strided(value.shape, strides, at).copy_(value)
        self.inputs.append((buffer, buffer.clone()))
        return buffer.as_strided(value.shape, strides, at)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        known = name in self.EMPTY or name in self.ZERO or name in self.PRODUCTS
        if not known or result.requires_grad or not result.numel() or result.is_meta:
            return result
        banded = self._with_bands(result)
        if name in self.ZERO:
            banded.zero_()
        elif name in self.PRODUCTS:
            banded.copy_(result)
        return banded

    def _with_bands(self, like: Tensor) -> Tensor:
        extent = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
        size = extent * like.element_size()
        buffer = torch.full((2 * MARGIN + size,), 255, dtype=torch.uint8, device=like.device)
        self.outputs.append((buffer, size))
        # Not a view: code under test may ask whether its output is one.
        window = torch.empty(0, dtype=like.dtype, device=like.device)
        storage, start = buffer.untyped_storage(), MARGIN // like.element_size()
        return window.set_(storage, start, like.shape, like.stride())

    def check(self) -> None:
        """Check that inputs and all bands have unchanged bits."""
        for buffer, before in self.inputs:
            assert torch.equal(buffer.view(torch.uint8), before.view(torch.uint8)), (
                "an input, or memory beside it, was written"
            )
        for buffer, size in self.outputs:
            bands = torch.cat([buffer[:MARGIN], buffer[MARGIN + size :]])
            assert (bands == 255).all(), f"memory beside an allocation of {size} bytes was written"
