"""What `pixel_shuffle_norm` merges, and how the merged tokens or their patches are normed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Which rows of x ``(batch, tokens, cols)`` make a block: those of a grid, or of an index.

    A grid has ``height x width`` tokens in row-major order; an index ``(blocks, factor ** 2)``
    numbers the rows of all images. ``by_channel``: channels are slowest in a merged token.
    """

    factor: int
    height: int
    width: int
    index: Tensor | None
    by_channel: bool

    @property
    def positions(self) -> int:
        return self.factor**2

    def count(self, batch: int) -> int:
        if self.index is not None:
            return self.index.shape[0]
        return batch * (self.height // self.factor) * (self.width // self.factor)


@dataclass(frozen=True)
class Norm:
    """``kind``: "layer", "rms" (rounded before the weight) or "gemma" (weight + 1, in fp32)."""

    kind: str
    after: bool
    eps: float
