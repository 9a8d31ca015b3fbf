"""Projectors of features to the width of the language model, and poolings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from vlm_fast.benchmarks.host.connector import (
    TILES,
    Connector,
    FixedTower,
    features,
    trained_features,
)


def config(vision: int, text: int, **more: Any) -> Any:
    """A config with the sizes that projectors read."""
    tower = SimpleNamespace(hidden_size=vision, hidden_act="gelu")
    return SimpleNamespace(
        vision_config=tower, text_config=SimpleNamespace(hidden_size=text, rms_norm_eps=1e-5),
        projector_hidden_act="gelu", multimodal_projector_bias=True, vision_feature_layer=-2,
        **more,
    )  # fmt: skip


def llava() -> nn.Module:
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    return LlavaMultiModalProjector(config(1024, 4096))


def vipllava() -> nn.Module:
    from transformers.models.vipllava.modeling_vipllava import VipLlavaMultiModalProjector

    layers = dict(vision_feature_layers=[-2, -5, -8, -11, 6], projector_layernorm_eps=1e-5)
    return VipLlavaMultiModalProjector(config(1024, 4096, **layers))


def fast_vlm() -> nn.Module:
    from transformers.models.fast_vlm.modeling_fast_vlm import FastVlmMultiModalProjector

    return FastVlmMultiModalProjector(config(3072, 3584))


def deepseek_vl() -> nn.Module:
    from transformers.models.deepseek_vl.modeling_deepseek_vl import DeepseekVLAligner

    return DeepseekVLAligner(config(1024, 2048))


def video_llama_3() -> nn.Module:
    from transformers.models.video_llama_3.modeling_video_llama_3 import VideoLlama3Projector

    return VideoLlama3Projector(config(1152, 3584))


def voxtral() -> nn.Module:
    from transformers.models.voxtral.modeling_voxtral import VoxtralMultiModalProjector

    sizes = config(1280, 3072, audio_config=SimpleNamespace(intermediate_size=5120))
    return VoxtralMultiModalProjector(sizes)


def ernie() -> nn.Module:
    from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as models

    sizes = config(1280, 2560)
    sizes.vision_config.rms_norm_eps = 1e-6
    return models.Ernie4_5_VLMoeVisionMLP(sizes, 4 * 1280, 4 * 1280)


def internvl() -> nn.Module:
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

    return InternVLMultiModalProjector(config(1024, 3584, downsample_ratio=0.5))


def internvl_model() -> nn.Module:
    """InternVL without towers: the model's method shuffles the pixels, the projector follows."""
    from transformers import InternVLConfig, InternVLModel

    tower = dict(
        hidden_size=64, num_attention_heads=1, num_hidden_layers=1, intermediate_size=64,
        image_size=[448, 448],
    )  # fmt: skip
    text = dict(
        model_type="qwen2", hidden_size=3584, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=28, num_key_value_heads=4, vocab_size=64,
    )  # fmt: skip
    model = InternVLModel(InternVLConfig(vision_config=tower, text_config=text, image_token_id=7))
    model.multi_modal_projector = internvl()
    return model


def shuffled(model: Any, pixels: torch.Tensor, hidden: torch.Tensor) -> Any:
    if not isinstance(model.vision_tower, FixedTower):
        model.vision_tower = FixedTower(hidden)
    model.vision_tower.hidden = hidden
    return model.get_image_features(
        pixel_values=pixels, vision_feature_layer=-1, vision_feature_select_strategy="default"
    ).pooler_output


def gemma3() -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

    sizes = config(1152, 2560, mm_tokens_per_image=256)
    vars(sizes.vision_config).update(layer_norm_eps=1e-6, image_size=896, patch_size=14)
    return Gemma3MultiModalProjector(sizes)


def perception_lm() -> nn.Module:
    from transformers.models.perception_lm import modeling_perception_lm as models

    sizes = config(1536, 4096, projector_pooling_ratio=2)
    sizes.vision_config.model_args = {"embed_dim": 1536}
    return models.PerceptionLMMultiModalProjector(sizes)


def next_video_pooler() -> nn.Module:
    from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoPooler

    sizes = config(1024, 4096, spatial_pool_mode="average", spatial_pool_stride=2)
    vars(sizes.vision_config).update(image_size=336, patch_size=14)
    return LlavaNextVideoPooler(sizes)


def onevision_model() -> nn.Module:
    """LLaVA-OneVision without towers: its projector, and the pooling of video frames."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionModel, SiglipVisionConfig

    tower = SiglipVisionConfig(
        hidden_size=1152, num_attention_heads=1, num_hidden_layers=1, intermediate_size=64,
        image_size=384, patch_size=14,
    )  # fmt: skip
    text = dict(
        model_type="qwen2", hidden_size=3584, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=28, num_key_value_heads=4, vocab_size=64,
    )  # fmt: skip
    return LlavaOnevisionModel(
        LlavaOnevisionConfig(
            vision_config=tower, text_config=text, image_token_index=7, video_token_index=8
        )
    )


def frames(model: Any, pixels: torch.Tensor, hidden: torch.Tensor) -> Any:
    if not isinstance(model.vision_tower, FixedTower):
        model.vision_tower = FixedTower(hidden)
    model.vision_tower.hidden = hidden
    return model.get_video_features(
        pixel_values=pixels, vision_feature_layer=-1, vision_feature_select_strategy="full"
    ).pooler_output


PROJECTORS = (
    Connector("LLaVA-1.5-7B projector", llava, features(1, 576, 1024)),
    Connector("VipLLaVA-7B projector", vipllava, features(1, 576, 5 * 1024)),
    Connector("FastVLM-7B projector", fast_vlm, features(1, 256, 3072)),
    Connector("DeepSeek-VL aligner", deepseek_vl, features(1, 576, 1024)),
    Connector("VideoLLaMA3 projector", video_llama_3, features(1024, 1152)),
    Connector("Voxtral projector", voxtral, features(1, 375, 5120)),
    Connector("ERNIE-4.5-VL spatial MLP", ernie, features(1024, 4 * 1280)),
    Connector("InternVL3-8B projector", internvl, features(TILES, 256, 4096)),
    Connector(
        "InternVL3-8B pixel shuffle and projector", internvl_model,
        lambda batch: (torch.zeros(TILES * batch, 3, 2, 2), torch.randn(TILES * batch, 1025, 1024)),
        shuffled,
    ),
    Connector("Gemma3-4B projector", gemma3, features(1, 4096, 1152)),
    Connector("PerceptionLM-8B projector", perception_lm, features(TILES, 1024, 1536)),
    Connector(
        "LLaVA-NeXT-Video pooler, 8 frames", next_video_pooler, trained_features(8, 576, 1024)
    ),
    Connector(
        "LLaVA-OneVision-7B video, 8 frames", onevision_model,
        lambda batch: (torch.zeros(batch, 8, 3, 2, 2), torch.randn(batch * 8, 729, 1152)),
        frames,
    ),
)  # fmt: skip
