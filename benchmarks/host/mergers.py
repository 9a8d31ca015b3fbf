"""Patch mergers and pixel shuffles, which join neighbouring patches, with their projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlm_fast.benchmarks.host.connector import TILES, Connector, features


def qwen2_vl() -> nn.Module:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

    return PatchMerger(dim=3584, context_dim=1280)


def qwen2_5_vl() -> nn.Module:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger

    return Qwen2_5_VLPatchMerger(dim=3584, context_dim=1280)


def qwen3_vl(*, norm_after: bool = False) -> nn.Module:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

    config = Qwen3VLVisionConfig(hidden_size=1152, out_hidden_size=4096)
    return Qwen3VLVisionPatchMerger(config, use_postshuffle_norm=norm_after)


def mistral3() -> nn.Module:
    from transformers import Mistral3Config
    from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector

    return Mistral3MultiModalProjector(Mistral3Config())


def unfolded(batch: int) -> tuple[Any, ...]:
    """Images of 1036 x 1036 pixels, which are 74 x 74 patches, and their sizes."""
    return torch.randn(batch * 74 * 74, 1024), torch.tensor([[1036, 1036]] * batch, device="cpu")


def idefics3() -> nn.Module:
    from transformers import Idefics3Config
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    vision, text = dict(hidden_size=1152), dict(model_type="llama", hidden_size=4096)
    return Idefics3Connector(Idefics3Config(vision_config=vision, text_config=text, scale_factor=2))


def smolvlm() -> nn.Module:
    from transformers import SmolVLMConfig
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

    vision, text = dict(hidden_size=1152), dict(model_type="llama", hidden_size=2048)
    return SmolVLMConnector(SmolVLMConfig(vision_config=vision, text_config=text, scale_factor=3))


def llama4() -> nn.Module:
    from transformers.models.llama4.configuration_llama4 import Llama4VisionConfig
    from transformers.models.llama4.modeling_llama4 import Llama4VisionPixelShuffleMLP

    config = Llama4VisionConfig(
        hidden_size=1408, intermediate_size=5632, projector_input_dim=4096,
        projector_output_dim=4096, pixel_shuffle_ratio=0.5,
    )  # fmt: skip
    return Llama4VisionPixelShuffleMLP(config)


def aya_vision() -> nn.Module:
    from transformers import AyaVisionConfig
    from transformers.models.aya_vision.modeling_aya_vision import AyaVisionMultiModalProjector

    config = AyaVisionConfig(
        vision_config=dict(model_type="siglip_vision_model", hidden_size=1152),
        text_config=dict(model_type="cohere2", hidden_size=4096),
        alignment_intermediate_size=28672,
    )  # fmt: skip
    return AyaVisionMultiModalProjector(config)


def cohere2_vision() -> nn.Module:
    from transformers import Cohere2VisionConfig
    from transformers.models.cohere2_vision.modeling_cohere2_vision import (
        Cohere2VisionMultiModalProjector,
    )

    config = Cohere2VisionConfig(
        vision_config=dict(model_type="siglip_vision_model", hidden_size=1152),
        text_config=dict(model_type="cohere2", hidden_size=12288),
        alignment_intermediate_size=36864,
    )  # fmt: skip
    return Cohere2VisionMultiModalProjector(config)


MERGERS = (
    Connector("Qwen2-VL-7B merger, 4096 patches", qwen2_vl, features(4096, 1280)),
    Connector("Qwen2.5-VL-7B merger, 4096 patches", qwen2_5_vl, features(4096, 1280)),
    Connector("Qwen3-VL-8B merger, 4096 patches", qwen3_vl, features(4096, 1152)),
    Connector(
        "Qwen3-VL-8B DeepStack merger, 4096 patches", lambda: qwen3_vl(norm_after=True),
        features(4096, 1152),
    ),
    Connector("Mistral-Small-3.1 projector", mistral3, unfolded),
    Connector("Idefics3-8B connector", idefics3, features(TILES, 676, 1152)),
    Connector("SmolVLM connector", smolvlm, features(TILES, 729, 1152)),
    Connector("Llama 4 adapter", llama4, features(5, 576, 1408)),
    Connector("Aya Vision 8B projector", aya_vision, features(TILES, 676, 1152)),
    Connector("Command A Vision projector", cohere2_vision, features(TILES, 1024, 1152)),
)  # fmt: skip
