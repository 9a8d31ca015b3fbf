"""Attention masks of Q-Formers: from the forms of transformers to those of the fused ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_fast.modules.qformer.layer_inputs import LayerInputs
from vlm_fast.modules.qformer.shared_inputs import self_attention_masks


def layer_inputs(hidden: Tensor, mask: Any, image_mask: Any, query_length: int) -> LayerInputs:
    """The `LayerInputs` for the masks that transformers' model passes to its encoder.

    Args:
        hidden: ``(batch, tokens, features)``.
        mask: of the tokens, boolean or additive, or None.
        image_mask: of the image features, boolean or additive, or None.
        query_length: how many of the tokens are queries.
    """
    key_mask, bias = self_attention_masks(_none_if_nothing_masked(mask), hidden)
    seen, image_bias = self_attention_masks(_none_if_nothing_masked(image_mask), hidden)
    if image_bias is not None and image_bias.shape[2] > query_length:
        image_bias = image_bias[:, :, :query_length]
    return LayerInputs(
        query_length=query_length, image_mask=seen, image_bias=image_bias,
        key_mask=key_mask, bias=bias,
    )  # fmt: skip


def _none_if_nothing_masked(mask: Any) -> Any:
    """``mask``, or None for an additive mask on the CPU that masks nothing."""
    additive = isinstance(mask, Tensor) and mask.is_floating_point() and mask.ndim == 4
    if additive and mask.is_cpu and not torch.compiler.is_compiling() and not mask.any():
        return None
    return mask


def why_not_masks(*masks: Any) -> str | None:
    """Why a mask is not a tensor that the kernels read, or None."""
    for mask in masks:
        if mask is not None and not isinstance(mask, Tensor):
            return f"a {type(mask).__name__} is no mask the kernels read"
    return None


def additive_mask(mask: Any, hidden: Tensor) -> Any:
    """The additive mask of a boolean one, as transformers' eager attention takes it."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(hidden.dtype).min
    return torch.zeros_like(mask, dtype=hidden.dtype).masked_fill_(~mask, lowest)
