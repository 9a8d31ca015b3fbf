"""What the layers of a Q-Former share in one forward: the image's keys and values, masks, seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_fast import ops
from vlm_fast.modules.qformer.layer import SEEDS, dropout_of, parameters_of
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_value

OP = "QFormer"


@dataclass(frozen=True)
class ImageKeyValues:
    """Keys and values of an image for all cross-attention layers; see `QFormer`.

    Attributes:
        layers: one ``(batch, keys, 2 * features)`` per cross-attention layer, keys before values.
    """

    layers: Sequence[Tensor]

    def select(self, rows: Tensor) -> ImageKeyValues:
        """Those of the images with these indices, int64 ``(count,)``."""
        return ImageKeyValues([layer.index_select(0, rows) for layer in self.layers])


def check_image(
    encoder: Any, queries: int, batch: int, image: Tensor | None, image_mask: Tensor | None,
    projected: ImageKeyValues | None,
) -> int:  # fmt: skip
    """How many images are read; ValueError or TypeError unless they fit the layers that do."""
    crossing = [m for m in map(_crossattention, encoder.layer) if m is not None]
    if not crossing or queries == 0:
        return 0
    if image is None and projected is None:
        raise ValueError(
            f"vlm_fast.{OP}: encoder_hidden_states is None, expected image features for "
            f"{len(crossing)} cross-attention layers"
        )
    if projected is not None:
        if len(projected.layers) != len(crossing):
            got, wanted = len(projected.layers), f"{len(crossing)}, one per cross-attention layer"
            raise wrong_value(OP, "image_key_values.layers", got, wanted)
        image = projected.layers[0]
    else:
        if not isinstance(image, Tensor):
            raise not_a_tensor(OP, "encoder_hidden_states", image)
        width = getattr(crossing[0].attention.key, "in_features", image.shape[-1])
        if image.ndim != 3 or image.shape[2] != width:
            raise wrong_value(OP, "encoder_hidden_states", image, f"(images, keys, {width})")
    images, keys = image.shape[:2]
    if (images == 0 or (batch % images and batch != 1)) and (batch or images):
        wanted = f"as many images as sequences ({batch}), or a divisor of that"
        raise wrong_value(OP, "encoder_hidden_states", image, wanted)
    if image_mask is not None and image_mask.shape != (images, keys):
        raise wrong_value(OP, "encoder_attention_mask", image_mask, f"({images}, {keys})")
    return images


def images_of_layers(
    encoder: Any, hidden: Tensor, image: Tensor | None, projected: ImageKeyValues | None,
    queries: int, *, plain: bool,
) -> list[tuple[Tensor | None, bool]]:  # fmt: skip
    """What each layer reads of the image, and whether that is keys and values already.

    ``plain``: whether the parameters of all layers may be read.
    """
    if image is None and projected is None:
        return [(None, False)] * len(encoder.layer)
    if projected is None and not (plain and any(map(_crosses, encoder.layer))):
        return [(image, False)] * len(encoder.layer)
    found = projected.layers if projected is not None else keys_and_values(encoder, image, plain)
    layers = iter(found)
    return [(next(layers), True) if _crosses(layer) else (None, False) for layer in encoder.layer]


def keys_and_values(encoder: Any, image: Any, plain: bool) -> Sequence[Tensor]:
    """Keys and values of all cross-attention layers, in one GEMM if the layers are plain."""
    crossing = [m for m in map(_crossattention, encoder.layer) if m is not None]
    linears = [child for m in crossing for child in (m.attention.key, m.attention.value)]
    if not plain:
        return [torch.cat((k(image), v(image)), dim=-1)
                for k, v in zip(linears[::2], linears[1::2], strict=True)]  # fmt: skip
    return ops.stacked_linear(image, parameters_of(linears)).chunk(len(crossing), dim=-1)


def _crossattention(layer: Any) -> Any:
    return getattr(layer, "crossattention", None)


def _crosses(layer: Any) -> bool:
    return _crossattention(layer) is not None


def drops(layers: Sequence[Any]) -> bool:
    """Whether any dropout of these layers is active."""
    return any(dropout_of(layer) > 0 for layer in layers)


def dropout_seeds(layers: Sequence[Any], hidden: Tensor) -> Tensor | None:
    """One int64 for each dropout of each layer, drawn on the device; None if none is active."""
    if not drops(layers):
        return None
    shape = (len(layers), SEEDS)
    return torch.randint(2**62, shape, dtype=torch.int64, device=hidden.device)


def self_attention_masks(
    mask: Tensor | None, hidden: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """A mask as the ops take it: seen keys, or an additive bias."""
    if mask is None:
        return None, None
    if mask.ndim == 2:
        return boolean(mask), None
    if mask.ndim == 3:
        mask = mask[:, None]
    if mask.ndim != 4:
        raise wrong_value(OP, "attention_mask", mask, "two to four dimensions")
    if mask.is_floating_point():
        return None, mask
    mask = boolean(mask)
    if mask.shape[1] == mask.shape[2] == 1:
        return mask[:, 0, 0], None
    return None, torch.zeros_like(mask, dtype=hidden.dtype).masked_fill_(~mask, -torch.inf)


def boolean(mask: Any) -> Any:
    return mask if mask is None or mask.dtype == torch.bool else mask != 0


def causal_bias(tokens: int, past_tokens: int, hidden: Tensor) -> Tensor:
    """``(1, 1, tokens, tokens + past)``: own tokens come first among the keys."""
    bias = hidden.new_full((tokens, tokens), -torch.inf).triu_(1)
    return torch.nn.functional.pad(bias, (0, past_tokens))[None, None]
