"""The setting of `spatial_pool`: a grid of tokens and how it is pooled."""

from __future__ import annotations


class Pooling:
    """The size of a grid and how it is pooled; ``mode`` is "avg", "max" or "bilinear".

    Attributes:
        pooled: height and width of the pooled grid.
    """

    __slots__ = ("height", "mode", "pooled", "stride", "width")

    def __init__(self, height: int, width: int, mode: str, stride: int) -> None:
        self.height, self.width, self.mode, self.stride = height, width, mode, stride
        if mode == "bilinear":
            self.pooled = -(-height // stride), -(-width // stride)
        else:
            self.pooled = height // stride, width // stride
