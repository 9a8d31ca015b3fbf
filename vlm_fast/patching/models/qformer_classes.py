"""Recognise the Q-Formers of transformers: BLIP-2's, InstructBLIP's and InstructBLIP-Video's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from vlm_fast.modules.parameter_access.activation import activation_name
from vlm_fast.modules.parameter_access.attention_settings import (
    active_attention_dropout,
    attention_scale,
)
from vlm_fast.modules.parameter_access.original_code import names_used_by


class QFormerSettings(NamedTuple):
    """Settings of the patch of a Q-Former.

    Attributes:
        compute_dtype: see `vlm_fast.patch`.
        additive: whether the model makes additive masks itself, as it does before transformers 5.9.
    """

    compute_dtype: torch.dtype | None = None
    additive: bool = False


_ATTENTION_CHILDREN = {"query", "key", "value"}
_OUTPUT_CHILDREN = {"dense", "LayerNorm", "dropout"}


def _has(module: Any, names: set[str]) -> bool:
    """Whether a module has children of these names."""
    return isinstance(module, nn.Module) and names <= dict(module.named_children()).keys()


def _is_layer(module: nn.Module) -> bool:
    """Whether a module has the children of a layer of BLIP-2's Q-Former."""
    if not _has(module, {"attention", "intermediate_query", "output_query"}):
        return False
    layer: Any = module
    blocks = [layer.attention, *filter(None, [getattr(layer, "crossattention", None)])]
    return all(
        _has(block, {"attention", "output"})
        and _has(block.attention, _ATTENTION_CHILDREN)
        and _has(block.output, _OUTPUT_CHILDREN)
        for block in blocks
    ) and _has(layer.output_query, _OUTPUT_CHILDREN)


def recognise_layer(module: nn.Module, **options: Any) -> QFormerSettings | str | None:
    """The settings for a layer of a Q-Former, a reason not to patch, or None for another module."""
    if not _is_layer(module):
        return None
    layer: Any = module
    if not _has_known_forward(type(module)):
        return f"the forward of {type(module).__name__} is not one that was read"
    if getattr(layer, "chunk_size_feed_forward", 0):
        return "chunk_size_feed_forward is set"
    if activation_name(layer.intermediate_query.intermediate_act_fn) is None:
        return f"{type(layer.intermediate_query.intermediate_act_fn).__name__} is not known"
    for block in (layer.attention, getattr(layer, "crossattention", layer.attention)):
        if getattr(block.attention, "position_embedding_type", "absolute") != "absolute":
            return f"its positions are {block.attention.position_embedding_type}"
        attention_scale(block.attention), active_attention_dropout(block.attention)
        block.attention.num_attention_heads  # noqa: B018
    return QFormerSettings(options.get("compute_dtype"))


def recognise_encoder(module: nn.Module, **options: Any) -> QFormerSettings | str | None:
    """The settings for the encoder of such layers, a reason not to patch, or None."""
    layers = getattr(module, "layer", None)
    if not isinstance(layers, nn.ModuleList) or not layers or not _has_known_forward(type(module)):
        return None
    found = [recognise_layer(layer, **options) for layer in layers]
    return next((f for f in found if not isinstance(f, QFormerSettings)), found[0])


def recognise_model(module: nn.Module, **options: Any) -> QFormerSettings | str | None:
    """The settings for the model around such an encoder, a reason not to patch, or None."""
    encoder = getattr(module, "encoder", None)
    if not isinstance(encoder, nn.Module) or not _has_known_forward(type(module)):
        return None
    found = recognise_encoder(encoder, **options)
    if not isinstance(found, QFormerSettings):
        return found
    names = names_used_by(type(module).forward)
    return found._replace(additive="get_extended_attention_mask" in names)


def _has_known_forward(cls: type[nn.Module]) -> bool:
    """Whether a class of transformers has the forward of BLIP-2's or InstructBLIP's Q-Former."""
    return cls.__module__.startswith("transformers.models.") and any(
        cls.__name__.startswith(family) and cls.__name__.endswith(("Model", "Encoder", "Layer"))
        for family in ("Blip2QFormer", "InstructBlipQFormer", "InstructBlipVideoQFormer")
    )
