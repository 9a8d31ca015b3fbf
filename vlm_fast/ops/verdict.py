"""The result of comparing one tensor with what it should be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Units in the last place by which a result may differ at least, by dtype.
ULPS = {torch.float32: 8, torch.bfloat16: 1, torch.float16: 1, torch.float64: 8}


@dataclass(frozen=True)
class Verdict:
    """One tensor's judgement: largest error, the budget it had, and what failed, if anything."""

    what: str
    error: float
    budget: float
    failure: str | None

    @property
    def ok(self) -> bool:
        return self.failure is None
