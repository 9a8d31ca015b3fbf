"""The setting of `spatial_pool`: a grid of tokens and how it is pooled."""

from __future__ import annotations


class Pooling:
    """The size of a grid and how it is pooled; ``mode`` is "avg", "max" or "bilinear".

    Attributes:
        pooled: height and width of the pooled grid.
        wide: whether products of two sides do not fit in int32.
    """

    __slots__ = ("height", "mode", "pooled", "stride", "wide", "width")

    def __init__(self, height: int, width: int, mode: str, stride: int) -> None:
        self.height, self.width, self.mode, self.stride = height, width, mode, stride
        self.wide = max(height, width) >= 2**15
        if mode == "bilinear":
            self.pooled = -(-height // stride), -(-width // stride)
        else:
            self.pooled = height // stride, width // stride
