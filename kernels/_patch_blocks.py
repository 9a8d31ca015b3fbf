"""Settings of `pixel_shuffle_norm`: which patches form a block, and which norm is applied."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


class Blocks:
    """The rows of x ``(batch, tokens, cols)`` that form each block of ``factor ** 2`` patches.

    Without an index the tokens of an image are a grid ``height x width`` in row-major order, and
    blocks are its squares. An index ``(blocks, factor ** 2)`` gives row numbers, counted over all
    images. ``by_channel``: the channel is the slowest dimension of a merged token, not the patch.

    Attributes:
        positions: patches in a block.
        across, per_image: blocks in a row of blocks, and in an image.
    """

    __slots__ = (
        "across", "by_channel", "factor", "height", "index", "per_image", "positions", "width",
    )  # fmt: skip

    def __init__(
        self, factor: int, height: int, width: int, index: Tensor | None, by_channel: bool
    ) -> None:
        self.factor, self.height, self.width = factor, height, width
        self.index, self.by_channel = index, by_channel
        self.positions, self.across = factor**2, width // factor
        self.per_image = height // factor * self.across

    def count(self, batch: int) -> int:
        """Blocks, and thus merged tokens, of ``batch`` images."""
        return batch * self.per_image if self.index is None else self.index.shape[0]


@dataclass(slots=True)
class Norm:
    """The norm of whole merged tokens (``after``) or of single patches.

    ``kind`` is "layer", "rms" (rounded before the weight) or "gemma" (weight + 1, in fp32).
    """

    kind: str
    after: bool
    eps: float
