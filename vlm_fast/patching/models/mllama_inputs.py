"""Masks and cached keys of Llama 3.2 Vision, in the forms of different transformers releases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_fast.ops.argument_errors import wrong_value
from vlm_fast.patching.media_masks import MediaMask


def mask_of_new_tokens(mask: Tensor, text: Tensor, cache: Any, cache_position: Any) -> Tensor:
    """The part of a mask ``(batch, length, images, tiles)`` for the tokens of this call."""
    if cache_position is not None:
        return mask[:, cache_position]
    tokens = text.shape[1]
    if mask.shape[1] == tokens:  # `generate` does so since transformers 5.18
        return mask
    first = cache.get_seq_length() if cache is not None else 0
    if not isinstance(first, int):
        return mask[:, torch.arange(tokens, device=mask.device) + first]
    if mask.shape[1] < first + tokens:
        wanted = (
            f"(batch, {first + tokens} or more, images, tiles): {first} tokens cached, then more"
        )
        raise wrong_value("patch(Mllama)", "cross_attention_mask", mask, wanted)
    return mask[:, first : first + tokens]


def cached_key_values(cache: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer in a cache of transformers, before and since 4.54."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return cache.key_cache[layer], cache.value_cache[layer]
    return layers[layer].keys, layers[layer].values


def dense_masks(sets: MediaMask, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two dense masks that the original model makes; a token without tiles attends to all."""
    some = (sets.bits != 0)[:, None, :, None]
    return sets.dense_mask(keys, dtype) * some, some.to(dtype)
