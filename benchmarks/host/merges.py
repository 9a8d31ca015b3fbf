"""The merge of image features into the embeddings of a prompt, and the packing of tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlm_fast.benchmarks.host.connector import Connector
from vlm_fast.ops.anyres_tiling import Tiling, tile_count

IMAGE, WORDS = 7, 64
TEXT = dict(
    hidden_size=4096, intermediate_size=64, num_hidden_layers=1, num_attention_heads=32,
    num_key_value_heads=1, vocab_size=64,
)  # fmt: skip
TOWER = dict(
    hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
    image_size=336, patch_size=14,
)  # fmt: skip


def llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaModel

    return LlavaModel(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**TOWER), text_config=LlamaConfig(**TEXT),
            image_token_id=IMAGE,
        )
    )  # fmt: skip


def qwen2_5_vl() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    config = Qwen2_5_VLConfig(
        vision_config=dict(
            depth=1, hidden_size=64, num_heads=1, intermediate_size=64, out_hidden_size=4096
        ),
        text_config={**TEXT, "rope_parameters": dict(rope_type="default", rope_theta=1e6,
                                                     mrope_section=[16, 24, 24])},
        image_token_id=IMAGE, video_token_id=IMAGE + 1,
    )  # fmt: skip
    return Qwen2_5_VLModel(config)


def prompts(rows: int) -> Any:
    """Prompts with the features of one image each, embeddings and features with gradients."""

    def given(batch: int) -> tuple[Any, ...]:
        ids = torch.full((batch, rows + WORDS), 1, dtype=torch.long, device="cpu")
        ids[:, 5 : 5 + rows] = IMAGE
        embeds = torch.randn(batch, rows + WORDS, 4096, requires_grad=True)
        images = torch.randn(batch, rows, 4096, requires_grad=True)
        return ids.to(embeds.device), embeds, images

    return given


def merge(model: Any, ids: torch.Tensor, embeds: torch.Tensor, images: torch.Tensor) -> Any:
    """As in LlavaModel.forward."""
    mask = model.get_placeholder_mask(ids, inputs_embeds=embeds, image_features=images)
    return embeds.masked_scatter(mask, images)


def merge_of_two_kinds(
    model: Any, ids: torch.Tensor, embeds: torch.Tensor, images: torch.Tensor
) -> Any:
    """As in Qwen2_5_VLModel.forward, of a prompt with images and without videos."""
    images = images.flatten(0, 1)
    mask, _ = model.get_placeholder_mask(ids, inputs_embeds=embeds, image_features=images)
    return embeds.masked_scatter(mask, images)


def llava_next() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextModel

    return LlavaNextModel(
        LlavaNextConfig(
            vision_config=CLIPVisionConfig(**TOWER), text_config=LlamaConfig(**TEXT),
            image_token_id=IMAGE,
        )
    )  # fmt: skip


def onevision() -> nn.Module:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionModel, SiglipVisionConfig

    tower = SiglipVisionConfig(**{**TOWER, "image_size": 384})
    text = {**TEXT, "model_type": "qwen2", "hidden_size": 3584, "num_attention_heads": 28}
    return LlavaOnevisionModel(
        LlavaOnevisionConfig(vision_config=tower, text_config=text, image_token_index=IMAGE)
    )


def tiles(tiling: Tiling, size: tuple[int, int], hidden: int) -> Any:
    """Features of images of this size as their model cuts them, their sizes, and a newline."""

    def given(batch: int) -> tuple[Any, ...]:
        counts = [tile_count(size, tiling)] * batch
        features = torch.randn(sum(counts), tiling.side**2, hidden, requires_grad=True)
        sizes = torch.tensor([size] * batch, device="cpu")
        return features, counts, sizes, torch.randn(hidden, requires_grad=True)

    return given


def pack_next(model: Any, features: torch.Tensor, counts: Any, sizes: Any, newline: Any) -> Any:
    return model.pack_image_features(
        features.split(counts), sizes, vision_feature_select_strategy="default",
        image_newline=newline,
    )[0]  # fmt: skip


def pack_onevision(
    model: Any, features: torch.Tensor, counts: Any, sizes: Any, newline: Any
) -> Any:
    return model.pack_image_features(features.split(counts), sizes, image_newline=newline)[0]


NEXT_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION_GRIDS = [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)]
MERGES = (
    Connector("LLaVA-1.5-7B merge", llava, prompts(576), merge, lambda n: n * 576 * 4096),
    Connector("Qwen2.5-VL merge", qwen2_5_vl, prompts(1024), merge_of_two_kinds,
              lambda n: n * 1024 * 4096),
    Connector(
        "LLaVA-NeXT-7B tiles, 2 x 2", llava_next,
        tiles(Tiling(NEXT_GRIDS, tile=336, side=24), (672, 672), 4096), pack_next,
    ),
    Connector(
        "LLaVA-OneVision-7B tiles, 2 x 2", onevision,
        tiles(Tiling(ONEVISION_GRIDS, tile=384, side=27, max_tiles=9), (768, 768), 3584),
        pack_onevision,
    ),
)  # fmt: skip
