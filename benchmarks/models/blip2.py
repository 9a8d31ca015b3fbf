"""BLIP-2 with ViT-g and OPT-2.7B: a Q-Former of 32 queries on 257 x 1408 image features."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlm_fast.benchmarks.models import photograph
from vlm_fast.benchmarks.models.architecture import (
    VOCABULARY,
    Architecture,
    Inputs,
    on,
    with_images,
)

IMAGE_TOKEN, QUERIES, WORDS = 7, 32, 32
# Changes of the configs of the tower, the Q-Former and the language model.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "whole": (
        {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39,
         "num_attention_heads": 16},
        {"encoder_hidden_size": 1408},
        {"hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240,
         "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "connector": (
        {"hidden_size": 1408, "intermediate_size": 1408, "num_hidden_layers": 2,
         "num_attention_heads": 16},
        {"encoder_hidden_size": 1408},
        {"hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 2560,
         "num_hidden_layers": 1, "num_attention_heads": 32},
    ),
    "small": (
        {"hidden_size": 176, "intermediate_size": 176, "num_hidden_layers": 2,
         "num_attention_heads": 2},
        {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2,
         "num_attention_heads": 2, "encoder_hidden_size": 176},
        {"hidden_size": 320, "word_embed_proj_dim": 320, "ffn_dim": 320,
         "num_hidden_layers": 1, "num_attention_heads": 4},
    ),
}  # fmt: skip


def make(size: str, layers: int | None) -> nn.Module:
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    tower, qformer, language = SIZES[size]
    language = language if layers is None else {**language, "num_hidden_layers": layers}
    config = Blip2Config(
        vision_config=dict(image_size=224, patch_size=14, **tower),
        qformer_config=dict(vocab_size=VOCABULARY, **qformer),
        text_config=dict(model_type="opt", vocab_size=VOCABULARY, eos_token_id=2, **language),
        num_query_tokens=QUERIES, image_token_index=IMAGE_TOKEN, image_token_id=IMAGE_TOKEN,
    )  # fmt: skip
    return Blip2ForConditionalGeneration(config)


def inputs(model: Any, size: str, batch: int) -> tuple[Inputs, str]:
    found, source = photograph.preprocessed(
        "blip", "BlipImageProcessorPil", size={"height": 224, "width": 224}
    )
    pixels = found.get("pixel_values")
    pixels = photograph.resized(224) if pixels is None else pixels
    given = with_images(batch, WORDS, QUERIES, IMAGE_TOKEN)
    return on({**given, "pixel_values": pixels.repeat(batch, 1, 1, 1)}, model), source


BLIP2 = Architecture(
    name="BLIP-2 OPT-2.7B",
    make=make,
    inputs=inputs,
    connectors={"Q-Former": "Blip2QFormerModel"},
    layers=32,
    period=1,
    batch={"whole": 8, "connector": 2, "small": 2},
    cut={
        "whole": "",
        "connector": "tower of 2 and language model of 1 narrow layers",
        "small": "an eighth of every width, 2, 2 and 1 layers",
    },
)
