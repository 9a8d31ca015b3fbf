"""FLOPs and bytes that a call of an op needs at least."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """The least work of one call: FLOPs, and bytes read and written, of each pass."""

    forward_flops: int
    forward_bytes: int
    backward_flops: int
    backward_bytes: int


def nbytes(*tensors: Tensor | None) -> int:
    """The number of bytes of all tensors together; None counts as 0."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
