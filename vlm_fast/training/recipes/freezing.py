"""Parts that do not learn: no dropout, no graph, and no layer that nobody asks for.

The class of a frozen module is swapped as `vlm_fast.patch` does it: parameters, names and
checkpoints stay, and `thaw` gives every module its own class back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast.patching.class_swap import SwappedClass, is_class, swap, swap_back

# Vision encoders of which every hidden state is what a layer returns, with nothing after the last.
TOWERS = {"clip": ("CLIPVisionModel",), "siglip": ("SiglipVisionModel",)}


class Frozen(SwappedClass):
    """A module in eval mode whatever its parent is put into; gradients pass through it.

    `nn.Module.train`, which training loops call before every step, would switch its dropout on.
    """

    def train(self, mode: bool = True) -> Any:
        module: nn.Module
        for module in self.modules():  # type: ignore[attr-defined]
            # A layer asks whether it is in training before it asks whether it is checkpointed.
            checkpointed = isinstance(module, FrozenLayer) and module.gradient_checkpointing
            module.training = mode and checkpointed
        return self


class FrozenLayer(Frozen):
    """A frozen layer that is checkpointed still: in training by its flag, in eval by its work."""

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
    """A vision encoder that keeps no graph, even where embeddings are made to want gradients."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class Skipped(SwappedClass):
    """A module whose result nobody reads. It gives NaN, in no memory: who does read it sees."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden.new_full((), math.nan).expand_as(hidden)


def freeze_tower(tower: nn.Module) -> None:
    """Swap the class of a tower none of whose parameters learn."""
    tower.requires_grad_(False)
    if not isinstance(tower, FrozenTower):
        swap(tower, FrozenTower, ())
    tower.eval()


def freeze_rest(model: nn.Module) -> None:
    """Put every module that has parameters, none of which learn, into eval for good.

    The largest such modules are swapped, and within them the layers that may be checkpointed.
    """
    for module in list(_frozen_roots(model)):
        for layer in filter(_is_layer, list(module.modules())):
            swap(layer, FrozenLayer, ())
        if not isinstance(module, Frozen):
            swap(module, Frozen, ())
        module.train()


def skip_unused(tower: nn.Module, feature_layers: int | list[int] | None) -> list[str]:
    """Skip the layers of a tower after the last whose output is used; returns their names.

    Hidden state i is what layer i - 1 returns, and 0 the embeddings, as transformers counts;
    negative numbers count from the end. Towers that are not known to work so are left alone.
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


def thaw(model: nn.Module) -> None:
    """Give every frozen or skipped module its own class back; what wants gradients stays."""
    for module in model.modules():
        if isinstance(module, Frozen | Skipped):
            swap_back(module)


def _frozen_roots(module: nn.Module) -> Iterator[nn.Module]:
    parameters = list(module.parameters())
    if not parameters or isinstance(module, Frozen | Skipped):
        return
    if any(p.requires_grad for p in parameters):
        for child in module.children():
            yield from _frozen_roots(child)
    elif any(True for _ in module.children()):  # a lone linear or norm has no dropout
        yield module


def _is_layer(module: nn.Module) -> bool:
    return any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)
