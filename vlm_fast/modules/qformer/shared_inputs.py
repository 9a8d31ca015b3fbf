"""Inputs that all layers of a Q-Former share: keys and values of the image, masks, seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.modules.qformer.layer import SEEDS, weights_and_biases
from vlm_fast.modules.qformer.whole_layer import dropout_switches
from vlm_fast.ops.argument_errors import wrong_value

OP = "QFormer"


@dataclass(frozen=True)
class ImageKeyValues:
    """Keys and values of images for all cross-attention layers; see `QFormer.image_key_values`.

    Attributes:
        layers: for each cross-attention layer ``(images, keys, 2 * features)``, keys before values.
    """

    layers: Sequence[Tensor]

    def select(self, rows: Tensor) -> ImageKeyValues:
        """The keys and values of the images with these indices, int64 ``(count,)``."""
        return ImageKeyValues([layer.index_select(0, rows) for layer in self.layers])


class ImageReaders(NamedTuple):
    """What the layers of an encoder read of an image.

    Attributes:
        reads: for each layer whether it has a cross-attention.
        crossing: the number of layers that have one.
        width: the features of the image that they take; None if they do not say.
        linears: the projections of each of these layers, keys before values.
    """

    reads: list[bool]
    crossing: int
    width: int | None
    linears: list[Any]

    def inputs(
        self, image: Tensor | None, projected: ImageKeyValues | None, *, plain: bool
    ) -> tuple[list[Tensor | None], bool]:
        """For each layer its image input, and whether that consists of keys and values already.

        ``plain``: whether the parameters of all layers can be read directly.
        """
        if image is None and projected is None:
            return [None] * len(self.reads), False
        if projected is None and not (plain and self.crossing):
            return [image] * len(self.reads), False
        found = iter(projected.layers if projected is not None else self.project(image, plain))
        return [next(found) if reads else None for reads in self.reads], True

    def project(self, image: Any, plain: bool) -> Sequence[Tensor]:
        """Keys and values of all cross-attention layers; one GEMM if ``plain``."""
        if not plain:
            pairs = zip(self.linears[::2], self.linears[1::2], strict=True)
            return [torch.cat((k(image), v(image)), dim=-1) for k, v in pairs]
        of_all = ops.stacked_linear(image, weights_and_biases(self.linears))
        return of_all.chunk(self.crossing, dim=-1) if self.crossing > 1 else [of_all]


def image_readers(layers: Sequence[Any]) -> ImageReaders:
    """The `ImageReaders` of these layers, or of views of them."""
    blocks = [cross_attention_of(layer) for layer in layers]
    crossing = [block.attention for block in blocks if block is not None]
    width = getattr(crossing[0].key, "in_features", None) if crossing else None
    linears = [linear for attention in crossing for linear in (attention.key, attention.value)]
    return ImageReaders([block is not None for block in blocks], len(crossing), width, linears)


def cross_attention_of(layer: Any) -> Any:
    """The cross-attention block of a layer, or None."""
    return getattr(layer, "crossattention", None)


def has_active_dropout(layers: Sequence[Any]) -> bool:
    """Whether any dropout in these layers is active."""
    return any(module.training for layer in layers for module in dropout_switches(layer))


def dropout_seeds(switches: Iterable[nn.Module], count: int, hidden: Tensor) -> Tensor | None:
    """Random int64 ``(count, SEEDS)``, drawn on the device; None if no dropout is active.

    ``switches``: what `dropout_switches` gives for all ``count`` layers.
    """
    for module in switches:
        if module.training:
            shape = (count, SEEDS)
            return torch.randint(2**62, shape, dtype=torch.int64, device=hidden.device)
    return None


def self_attention_masks(
    mask: Tensor | None, hidden: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """A mask in the form of the ops: bool ``(batch, keys)``, or an additive bias; one is None."""
    if mask is None:
        return None, None
    if mask.ndim == 2:
        return as_bool_mask(mask), None
    if mask.ndim == 3:
        mask = mask[:, None]
    if mask.ndim != 4:
        raise wrong_value(OP, "attention_mask", mask, "two to four dimensions")
    if mask.is_floating_point():
        return None, mask
    mask = as_bool_mask(mask)
    if mask.shape[1] == mask.shape[2] == 1:
        return mask[:, 0, 0], None
    return None, torch.zeros_like(mask, dtype=hidden.dtype).masked_fill_(~mask, -torch.inf)


def as_bool_mask(mask: Any) -> Any:
    """A mask as bool, true where it is not 0; None stays None."""
    return mask if mask is None or mask.dtype == torch.bool else mask != 0


def causal_bias(tokens: int, past_tokens: int, hidden: Tensor) -> Tensor:
    """Additive causal mask ``(1, 1, tokens, tokens + past)``; the new tokens are the first keys."""
    bias = hidden.new_full((tokens, tokens), -torch.inf).triu_(1)
    return torch.nn.functional.pad(bias, (0, past_tokens))[None, None]
