"""Freeze modules: lasting eval mode, vision encoders without a graph, unused layers skipped.

The class of a frozen module is swapped in place, as `vlm_fast.patch` does. Parameters, their names
and checkpoints stay the same, and `unfreeze` restores the original classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast.patching.class_swap import SwappedClass, is_class, swap, swap_back

# Vision encoders whose hidden states are the outputs of their layers, with nothing after the last.
TOWERS = {"clip": ("CLIPVisionModel",), "siglip": ("SiglipVisionModel",)}


class Frozen(SwappedClass):
    """A module that stays in eval mode when its parent is switched to training.

    Gradients flow through it. Training loops call ``model.train()`` before every step, which would
    switch dropout on again.
    """

    def train(self, mode: bool = True) -> Any:
        """Set only layers that are checkpointed to training; see `FrozenLayer`."""
        module: nn.Module
        for module in self.modules():  # type: ignore[attr-defined]
            # transformers checks a layer's training flag before it checkpoints the layer.
            checkpointed = isinstance(module, FrozenLayer) and module.gradient_checkpointing
            module.training = mode and checkpointed
        return self


class FrozenLayer(Frozen):
    """A frozen layer that can be checkpointed.

    transformers checkpoints only layers in training mode, so the training flag is on and is
    switched off during the layer's own forward.
    """

    gradient_checkpointing: bool
    training: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        self.training = False
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.training = True


class FrozenTower(Frozen):
    """A vision encoder that builds no autograd graph, even if its embeddings require gradients."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class Skipped(SwappedClass):
    """A module whose output is not used. It returns NaN, so that a use would be noticed."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden.new_full((), math.nan).expand_as(hidden)


def freeze_tower(tower: nn.Module) -> None:
    """Freeze a vision encoder: no gradients, no graph, eval mode."""
    tower.requires_grad_(False)
    if not isinstance(tower, FrozenTower):
        swap(tower, FrozenTower, ())
    tower.eval()


def freeze_rest(model: nn.Module) -> None:
    """Put every module without trainable parameters into lasting eval mode.

    The largest such modules are swapped, and inside them the layers that may be checkpointed.
    """
    for module in list(_frozen_roots(model)):
        for layer in filter(_is_layer, list(module.modules())):
            swap(layer, FrozenLayer, ())
        if not isinstance(module, Frozen):
            swap(module, Frozen, ())
        module.train()


def skip_unused(tower: nn.Module, feature_layers: int | list[int] | None) -> list[str]:
    """Skip the layers of a vision encoder behind the last one whose output is used.

    Args:
        tower: the vision encoder. Classes that are not listed in `TOWERS` are left unchanged.
        feature_layers: indices of hidden states that the model uses, counted as in transformers: 0
            is the embeddings and i the output of layer i - 1; negative numbers count from the end.

    Returns:
        The names of the skipped modules.
    """
    if feature_layers is None or not any(is_class(tower, f, *n) for f, n in TOWERS.items()):
        return []
    known: Any = tower
    layers = known.encoder.layers
    wanted = [feature_layers] if isinstance(feature_layers, int) else list(feature_layers)
    used = max(index if index >= 0 else len(layers) + 1 + index for index in wanted)
    unused = [(f"encoder.layers.{i}", layers[i]) for i in range(used, len(layers))]
    unused += [(n, m) for n, m in tower.named_children() if n in ("post_layernorm", "head")]
    for _, module in unused:
        if not isinstance(module, Skipped):
            swap(module, Skipped, ())
    return [name for name, _ in unused]


def unfreeze(model: nn.Module) -> None:
    """Restore the class of every frozen or skipped module. ``requires_grad`` is not changed."""
    for module in model.modules():
        if isinstance(module, Frozen | Skipped):
            swap_back(module)


def _frozen_roots(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules without trainable parameters."""
    parameters = list(module.parameters())
    if not parameters or isinstance(module, Frozen | Skipped):
        return
    if any(p.requires_grad for p in parameters):
        for child in module.children():
            yield from _frozen_roots(child)
    elif any(True for _ in module.children()):  # a single linear or norm has no dropout
        yield module


def _is_layer(module: nn.Module) -> bool:
    return any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)
