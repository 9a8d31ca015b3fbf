"""IDEFICS-9B: a resampler of ViT-H features, and gated layers that look at images."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlm_fast.benchmarks.models import photograph
from vlm_fast.benchmarks.models.architecture import VOCABULARY, Architecture, Inputs, on, text

IMAGES, WORDS = 2, 64
# Changes of the configs of the language model, the tower and the resampler.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "whole": (
        {"num_hidden_layers": 32, "cross_layer_interval": 4},
        {"embed_dim": 1280, "num_hidden_layers": 32},
        {},
    ),
    "connector": (
        {"num_hidden_layers": 1, "cross_layer_interval": 1, "intermediate_size": 2752},
        {"embed_dim": 1280, "intermediate_size": 1280, "num_hidden_layers": 2},
        {},
    ),
    "small": (
        {"num_hidden_layers": 2, "cross_layer_interval": 2, "hidden_size": 256,
         "num_attention_heads": 2, "intermediate_size": 688},
        {"embed_dim": 80, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 2, "image_size": 56},
        {"resampler_depth": 2, "resampler_n_heads": 2},
    ),
}  # fmt: skip


def make(size: str, layers: int | None) -> nn.Module:
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    language, tower, resampler = SIZES[size]
    language = language if layers is None else {**language, "num_hidden_layers": layers}
    config = IdeficsConfig(
        vocab_size=VOCABULARY, qk_layer_norms=True, use_resampler=True, attn_implementation="sdpa",
        vision_config=tower,
        perceiver_config={"use_resampler": True, "qk_layer_norms_perceiver": True, **resampler},
        **language,
    )  # fmt: skip
    return IdeficsForVisionText2Text(config)


def inputs(model: Any, size: str, batch: int) -> tuple[Inputs, str]:
    """Several images; a word attends to the last image before it, the first words to none."""
    side = SIZES[size][1].get("image_size", 224)
    pixels, source = photograph.preprocessed("idefics", "IdeficsImageProcessorPil", image_size=side)
    pixels = pixels if len(pixels) else photograph.resized(side)
    ids = text(batch, WORDS)
    seen = torch.zeros(batch, WORDS, IMAGES, dtype=torch.long)
    for image in range(IMAGES):
        start = 5 + image * WORDS // IMAGES
        seen[:, start:] = 0
        seen[:, start:, image] = 1
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.clone(),
        "pixel_values": pixels.repeat(batch, IMAGES, 1, 1, 1),
        "image_attention_mask": seen,
    }
    return on(given, model), source


IDEFICS = Architecture(
    name="IDEFICS-9B",
    make=make,
    inputs=inputs,
    connectors={
        "resampler": "IdeficsPerceiverResampler",
        "gated layer": "IdeficsGatedCrossAttentionLayer",
    },
    layers=32,
    period=4,
    batch={"whole": 2, "connector": 1, "small": 2},
    cut={
        "whole": "",
        "connector": "tower of 2 layers, one layer and one gated, a quarter of their MLPs",
        "small": "56 pixels, a sixteenth of every width, 2 layers of each",
    },
    acts_in_decoding=True,
)
