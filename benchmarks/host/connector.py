"""A connector whose host time is measured: how it is built, its inputs, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

TILES = 13  # of an image that is cut into tiles: 12 and the whole image


def run(module: nn.Module, *given: Any) -> Any:
    return module(*given)


@dataclass(frozen=True)
class Connector:
    """A connector at the sizes of its model.

    Attributes:
        name: the model and the part of it.
        make: builds the module that `vlm_fast.patch` gets, in the default dtype and device.
        given: builds the arguments for a number of images.
        call: calls the module with them. The tensors in its result that need gradients are
            differentiated in training.
        counted: for a number of images, the count of elements that the host reads; a stub cannot
            count. Conditions that the host reads are true on a stub, as those of these inputs are.
    """

    name: str
    make: Callable[[], nn.Module]
    given: Callable[[int], tuple[Any, ...]]
    call: Callable[..., Any] = run
    counted: Callable[[int], int] = lambda batch: 0


def features(*shape: int) -> Callable[[int], tuple[Any, ...]]:
    """Random features of a number of images: this shape, its first size times their number."""
    first, *rest = shape
    return lambda batch: (torch.randn(first * batch, *rest),)


def trained_features(*shape: int) -> Callable[[int], tuple[Any, ...]]:
    """As `features`, of a tower that is trained: they need a gradient."""
    return lambda batch: (features(*shape)(batch)[0].requires_grad_(),)


class FixedTower(nn.Module):
    """A vision tower without cost: every call returns the same hidden states."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, *given: Any, **options: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.hidden, hidden_states=(self.hidden,) * 2)
