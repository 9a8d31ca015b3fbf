"""Q-Formers and resamplers: a few learned queries attend to the features of an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlm_fast.benchmarks.host.connector import Connector, features

LAYERS = 2  # of a Q-Former or a resampler, instead of 12 and 6


def blip2() -> nn.Module:
    from transformers import Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

    return Blip2QFormerModel(Blip2QFormerConfig(num_hidden_layers=LAYERS, vocab_size=64))


def instructblip() -> nn.Module:
    from transformers import InstructBlipQFormerConfig
    from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

    return InstructBlipQFormerModel(InstructBlipQFormerConfig(num_hidden_layers=LAYERS))


def images_of_qformer(batch: int) -> tuple[Any, ...]:
    images = torch.randn(batch, 257, 1408)
    seen = torch.ones(batch, 257, dtype=torch.long)
    return torch.randn(1, 32, 768).expand(batch, -1, -1), images, seen


def queried(model: nn.Module, query: Any, images: Any, seen: Any) -> Any:
    return model(
        query_embeds=query, encoder_hidden_states=images, encoder_attention_mask=seen
    ).last_hidden_state


def words_of_qformer(batch: int) -> tuple[Any, ...]:
    words = torch.ones(batch, 64, dtype=torch.long)
    return *images_of_qformer(batch), words, torch.ones(batch, 96, dtype=torch.long)


def instructed(model: nn.Module, query: Any, images: Any, seen: Any, words: Any, mask: Any) -> Any:
    return model(
        input_ids=words, attention_mask=mask, query_embeds=query, encoder_hidden_states=images,
        encoder_attention_mask=seen,
    ).last_hidden_state  # fmt: skip


def idefics() -> nn.Module:
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    config = IdeficsConfig(
        vision_config=dict(embed_dim=1280), perceiver_config=dict(qk_layer_norms_perceiver=True)
    )
    return IdeficsPerceiverResampler(config, 1280, LAYERS, 16, 96, 64)


def idefics2(attention: str = "sdpa") -> nn.Module:
    from transformers import Idefics2Config
    from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

    config = Idefics2Config(
        vision_config=dict(hidden_size=1152), attn_implementation=attention,
        text_config=dict(model_type="mistral"),
        perceiver_config=dict(hidden_size=4096, resampler_depth=LAYERS),
    )  # fmt: skip
    return Idefics2Connector(config)


def patches_of_idefics2(batch: int) -> tuple[Any, ...]:
    return torch.randn(batch, 4900, 1152), torch.ones(batch, 4900, dtype=torch.bool)


def aria() -> nn.Module:
    from transformers import AriaConfig
    from transformers.models.aria.modeling_aria import AriaProjector

    config = AriaConfig(
        vision_config=dict(
            model_type="idefics3_vision", hidden_size=1152, num_attention_heads=16
        ),
        text_config=dict(model_type="aria_text", hidden_size=2560),
        projector_patch_to_query_dict={1225: 128, 4900: 256},
    )  # fmt: skip
    return AriaProjector(config)


def kosmos2() -> nn.Module:
    from transformers import Kosmos2Config
    from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ImageToTextProjection

    config = Kosmos2Config()
    config.text_config._attn_implementation = "sdpa"
    return Kosmos2ImageToTextProjection(config)


def kosmos2_5() -> nn.Module:
    from transformers import Kosmos2_5Config
    from transformers.models.kosmos2_5.modeling_kosmos2_5 import Kosmos2_5ImageToTextProjection

    config = Kosmos2_5Config()
    config.text_config._attn_implementation = "sdpa"
    return Kosmos2_5ImageToTextProjection(config)


def first(module: nn.Module, *given: Any) -> Any:
    return module(*given)[0]


RESAMPLERS = (
    Connector("BLIP-2 Q-Former, 2 layers", blip2, images_of_qformer, queried),
    Connector("InstructBLIP Q-Former, 2 layers", instructblip, words_of_qformer, instructed),
    Connector("IDEFICS-9B resampler, 2 layers", idefics, features(1, 257, 1280)),
    Connector("Idefics2-8B connector, 2 layers", idefics2, patches_of_idefics2),
    Connector("Aria projector", aria, features(1, 4900, 1152)),
    Connector("Kosmos-2 projection", kosmos2, features(1, 257, 1024), first),
    Connector("Kosmos-2.5 projection", kosmos2_5, features(1, 2048, 1536), first),
)
