"""Settings of `pixel_shuffle_norm`: which patches form a block, and which norm is applied."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Blocks:
    """The rows of x ``(batch, tokens, cols)`` that form each block of ``factor ** 2`` patches.

    Without an index the tokens of an image are a grid ``height x width`` in row-major order, and
    blocks are its squares. An index ``(blocks, factor ** 2)`` gives row numbers, counted over all
    images. ``by_channel``: the channel is the slowest dimension of a merged token, not the patch.
    """

    factor: int
    height: int
    width: int
    index: Tensor | None
    by_channel: bool

    @property
    def positions(self) -> int:
        """Patches in a block."""
        return self.factor**2

    def count(self, batch: int) -> int:
        """Blocks, and thus merged tokens, of ``batch`` images."""
        if self.index is not None:
            return self.index.shape[0]
        return batch * (self.height // self.factor) * (self.width // self.factor)


@dataclass(slots=True)
class Norm:
    """The norm of whole merged tokens (``after``) or of single patches.

    ``kind`` is "layer", "rms" (rounded before the weight) or "gemma" (weight + 1, in fp32).
    """

    kind: str
    after: bool
    eps: float
