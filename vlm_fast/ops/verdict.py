"""The result of comparing one computed tensor with its reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# The least tolerance of each dtype, in units in the last place.
ULPS = {torch.float32: 8, torch.bfloat16: 1, torch.float16: 1, torch.float64: 8}


@dataclass(frozen=True)
class Verdict:
    """The largest error of one tensor, the error allowed, and the failure, or None."""

    what: str
    error: float
    budget: float
    failure: str | None

    @property
    def ok(self) -> bool:
        return self.failure is None
