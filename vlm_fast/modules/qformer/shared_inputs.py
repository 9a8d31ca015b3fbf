"""Inputs that all layers of a Q-Former share: keys and values of the image, masks, seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_fast import ops
from vlm_fast.modules.qformer.layer import SEEDS, largest_active_dropout, weights_and_biases
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


def image_inputs(
    layers: Sequence[Any], image: Tensor | None, projected: ImageKeyValues | None, *, plain: bool,
) -> list[tuple[Tensor | None, bool]]:  # fmt: skip
    """For each layer its image input, and whether that consists of keys and values already.

    ``plain``: whether the parameters of all layers can be read directly.
    """
    if image is None and projected is None:
        return [(None, False)] * len(layers)
    reading = [cross_attention_of(layer) is not None for layer in layers]
    if projected is None and not (plain and any(reading)):
        return [(image, False)] * len(layers)
    given = projected.layers if projected is not None else project_image(layers, image, plain)
    found = iter(given)
    return [(next(found), True) if reads else (None, False) for reads in reading]


def project_image(layers: Sequence[Any], image: Any, plain: bool) -> Sequence[Tensor]:
    """Keys and values of all cross-attention layers; one GEMM if ``plain``."""
    crossing = [m for m in map(cross_attention_of, layers) if m is not None]
    linears = [child for m in crossing for child in (m.attention.key, m.attention.value)]
    if not plain:
        return [torch.cat((k(image), v(image)), dim=-1)
                for k, v in zip(linears[::2], linears[1::2], strict=True)]  # fmt: skip
    return ops.stacked_linear(image, weights_and_biases(linears)).chunk(len(crossing), dim=-1)


def cross_attention_of(layer: Any) -> Any:
    """The cross-attention block of a layer, or None."""
    return getattr(layer, "crossattention", None)


def has_active_dropout(layers: Sequence[Any]) -> bool:
    """Whether any dropout in these layers is active."""
    return max(0.0, *map(largest_active_dropout, layers)) > 0


def dropout_seeds(layers: Sequence[Any], hidden: Tensor) -> Tensor | None:
    """Random int64 ``(layers, SEEDS)``, drawn on the device; None if no dropout is active."""
    if not has_active_dropout(layers):
        return None
    shape = (len(layers), SEEDS)
    return torch.randint(2**62, shape, dtype=torch.int64, device=hidden.device)


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
