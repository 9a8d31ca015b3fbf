"""The setting of `spatial_pool`: a grid of tokens and how it is pooled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pooling:
    """The size of a grid and how it is pooled; ``mode`` is "avg", "max" or "bilinear"."""

    height: int
    width: int
    mode: str
    stride: int

    @property
    def pooled(self) -> tuple[int, int]:
        """Height and width of the pooled grid."""
        if self.mode == "bilinear":
            return -(-self.height // self.stride), -(-self.width // self.stride)
        return self.height // self.stride, self.width // self.stride
