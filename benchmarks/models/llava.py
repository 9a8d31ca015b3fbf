"""LLaVA-1.5-7B: CLIP-L at 336 pixels, a projector 1024 -> 4096 -> 4096, and the merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast.benchmarks.before_and_after import Part, with_gradients, without_gradients
from vlm_fast.benchmarks.models import photograph
from vlm_fast.benchmarks.models.architecture import (
    VOCABULARY,
    Architecture,
    Inputs,
    States,
    on,
    with_images,
)

IMAGE_TOKEN, WORDS, PATCH = 7, 64, 14
SIDE = {"whole": 336, "connector": 336, "small": 112}
SIZES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "whole": (
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
         "num_attention_heads": 16},
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32},
    ),
    "connector": (
        {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 2,
         "num_attention_heads": 16},
        {"hidden_size": 4096, "intermediate_size": 512, "num_hidden_layers": 1,
         "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    ),
    "small": (
        {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 2},
        {"hidden_size": 512, "intermediate_size": 128, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    ),
}  # fmt: skip


def make(size: str, layers: int | None) -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    tower, language = SIZES[size]
    language = language if layers is None else {**language, "num_hidden_layers": layers}
    return Llava(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                image_size=SIDE[size], patch_size=PATCH, projection_dim=768, **tower
            ),
            text_config=LlamaConfig(
                vocab_size=VOCABULARY, max_position_embeddings=4096, **language
            ),
            image_token_id=IMAGE_TOKEN, projector_hidden_act="gelu", vision_feature_layer=-2,
        )
    )  # fmt: skip


def inputs(model: Any, size: str, batch: int) -> tuple[Inputs, str]:
    side = SIDE[size]
    found, source = photograph.preprocessed(
        "clip", "CLIPImageProcessorPil", size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
    )  # fmt: skip
    pixels = found.get("pixel_values")
    pixels = photograph.resized(side) if pixels is None else pixels
    given = with_images(batch, WORDS, (side // PATCH) ** 2, IMAGE_TOKEN)
    return on({**given, "pixel_values": pixels.repeat(batch, 1, 1, 1)}, model), source


def merges(states: States, given: Inputs) -> Iterator[Part]:
    """The part of LlavaModel.forward between projector and language model."""
    some: Any = states["before"]
    embeds = some.get_input_embeddings()(given["input_ids"]).detach().requires_grad_()
    features = torch.randn_like(embeds[given["input_ids"] == IMAGE_TOKEN]).requires_grad_()

    def merge(model: Any) -> Tensor:
        mask = model.model.get_placeholder_mask(
            given["input_ids"], inputs_embeds=embeds, image_features=features
        )
        return embeds.masked_scatter(mask, features)

    called: dict[str, Callable[[], Any]] = {s: partial(merge, m) for s, m in states.items()}
    known = [embeds, features, *given.values()]
    yield Part("merge, forward", without_gradients(called), known)
    steps = with_gradients(called, (embeds, features), torch.randn_like(embeds))
    yield Part("merge, forward+backward", steps, known)


LLAVA = Architecture(
    name="LLaVA-1.5-7B",
    make=make,
    inputs=inputs,
    connectors={"projector": "LlavaMultiModalProjector"},
    layers=32,
    period=1,
    batch={"whole": 2, "connector": 1, "small": 2},
    cut={
        "whole": "",
        "connector": "tower of 2 and language model of 1 narrow layers",
        "small": "112 pixels, an eighth of every width, 2 and 1 layers",
    },
    more=merges,
)
