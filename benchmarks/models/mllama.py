"""Llama-3.2-11B-Vision: cross-attention layers over the tiles of an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlm_fast.benchmarks.models import photograph
from vlm_fast.benchmarks.models.architecture import VOCABULARY, Architecture, Inputs, on, text

TILES, WORDS = 4, 64
ROTATION = dict(rope_type="default", rope_theta=5e5)
# Changes of the configs of the language model and the tower.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "whole": (
        {"num_hidden_layers": 40},
        {"image_size": 560},
    ),
    "connector": (
        {"num_hidden_layers": 2, "intermediate_size": 3584, "cross_attention_layers": [1]},
        {"image_size": 280, "num_hidden_layers": 1, "num_global_layers": 1,
         "intermediate_size": 1280, "intermediate_layers_indices": [0] * 5},
    ),
    "small": (
        {"num_hidden_layers": 2, "intermediate_size": 896, "cross_attention_layers": [1],
         "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
        {"image_size": 56, "num_hidden_layers": 1, "num_global_layers": 1,
         "intermediate_size": 80, "intermediate_layers_indices": [0], "hidden_size": 80,
         "vision_output_dim": 160, "attention_heads": 2},
    ),
}  # fmt: skip


def make(size: str, layers: int | None) -> nn.Module:
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    language, tower = SIZES[size]
    language = language if layers is None else {**language, "num_hidden_layers": layers}
    language = {"cross_attention_layers": [*range(3, language["num_hidden_layers"], 5)], **language}
    config = MllamaConfig(
        vision_config=tower,
        text_config=dict(
            vocab_size=VOCABULARY, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, rope_parameters=ROTATION, **language,
        ),
        attn_implementation="sdpa",
    )  # fmt: skip
    return MllamaForConditionalGeneration(config)


def inputs(model: Any, size: str, batch: int) -> tuple[Inputs, str]:
    """Words attend to all tiles, except words before the image, which attend to none."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    side = SIZES[size][1]["image_size"]
    found, source = photograph.preprocessed(
        "mllama", "MllamaImageProcessorPil", side=2 * side, size={"height": side, "width": side},
        max_image_tiles=TILES, image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD,
    )  # fmt: skip
    found = dict(found) or _by_torch(side)
    ids = text(batch, WORDS)
    seen = torch.ones(batch, WORDS, 1, TILES, dtype=torch.long)
    seen[:, :5] = 0
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.clone(),
        "cross_attention_mask": seen,
    }
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        given[name] = found[name].repeat(batch, *[1] * (found[name].ndim - 1))
    return on(given, model), source


def _by_torch(side: int) -> Inputs:
    tiles = photograph.resized(2 * side).unfold(2, side, side).unfold(3, side, side)
    return {
        "pixel_values": tiles.permute(0, 2, 3, 1, 4, 5).reshape(1, 1, TILES, 3, side, side),
        "aspect_ratio_ids": torch.full((1, 1), 6),  # 2 x 2
        "aspect_ratio_mask": torch.ones(1, 1, TILES, dtype=torch.long),
    }


MLLAMA = Architecture(
    name="Llama-3.2-11B-Vision",
    make=make,
    inputs=inputs,
    connectors={"cross-attention layer": "MllamaCrossAttentionDecoderLayer"},
    layers=40,
    period=5,
    batch={"whole": 1, "connector": 1, "small": 2},
    cut={
        "whole": "",
        "connector": "tower of 2 narrow layers and a quarter of the patches, one layer and one "
        "cross-attention layer, a quarter of their MLPs",
        "small": "56 pixels a tile, a sixteenth of every width, 2 layers of each",
    },
    acts_in_decoding=True,
)
