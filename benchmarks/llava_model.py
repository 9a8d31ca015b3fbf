"""A photograph and transformers' LLaVA with random weights, in three sizes.

"whole" is LLaVA-1.5-7B but for its vocabulary. "connector" has its connector (CLIP's tower of
hidden size 1024 at 336 px with patches of 14, so 576 tokens; projector 1024 -> 4096 -> 4096; Llama
of hidden size 4096) between a tower and a language model cut to what a CPU runs in a second.
"small" is that with an eighth of every width, for trying things out.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

IMAGE_TOKEN, IMAGE_TOKENS = 7, 576
TEXT_TOKENS = 64
VOCABULARY = 1024
WHOLE_MODEL_BYTES = 75 * 2**30  # parameters and three times their gradients, in bf16, and more
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


def photograph() -> tuple[Any, str]:
    """A picture as (height, width, 3) bytes, and what it is."""
    if importlib.util.find_spec("skimage"):
        from skimage import data

        return data.astronaut(), "astronaut.png of scikit-image"
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 32, 32, generator=generator)
    picture = nn.functional.interpolate(coarse, (512, 512), mode="bicubic").clamp(0, 1)
    return (picture[0].permute(1, 2, 0) * 255).byte().numpy(), "smooth noise: no scikit-image here"


def pixels(picture: Any, what: str) -> tuple[Tensor, str]:
    """``(1, 3, 336, 336)`` as LLaVA-1.5 preprocesses a picture; what it is and by what."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    if importlib.util.find_spec("PIL") is None:
        values = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
        values = nn.functional.interpolate(values, (336, 336), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        return (values - mean) / std, f"{what}, by torch: no Pillow here"
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        do_resize=True, size={"shortest_edge": 336}, resample=3,
        do_center_crop=True, crop_size={"height": 336, "width": 336},
        do_rescale=True, rescale_factor=1 / 255,
        do_normalize=True, image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD,
        do_convert_rgb=True,
    )  # fmt: skip
    values = processor(images=picture, return_tensors="pt")["pixel_values"]
    return values, f"{what}, by {type(processor).__name__}"


def size_for(device: str, *, quick: bool) -> str:
    """ "whole", "connector" or "small": the largest that this machine runs in reasonable time."""
    if quick:
        return "small"
    if device == "cpu":
        return "connector"
    memory = torch.cuda.get_device_properties(0).total_memory
    return "whole" if memory > WHOLE_MODEL_BYTES else "connector"


def model(device: str, dtype: torch.dtype, *, size: str) -> nn.Module:
    """A LLaVA with random weights, ready for prompts of `inputs`."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    tower, language = SIZES[size]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14, projection_dim=768, **tower),
        text_config=LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096, **language),
        image_token_id=IMAGE_TOKEN, projector_hidden_act="gelu", vision_feature_layer=-2,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Llava(config).eval()
    finally:
        torch.set_default_dtype(before)


def inputs(pixel_values: Tensor, batch: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Prompts that place their image differently, with labels on the text."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, VOCABULARY, (batch, TEXT_TOKENS + IMAGE_TOKENS), generator=generator)
    for sample in range(batch):
        start = 5 + sample % (TEXT_TOKENS - 10)
        ids[sample, start : start + IMAGE_TOKENS] = IMAGE_TOKEN
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": pixel_values.repeat(batch, 1, 1, 1).to(device, dtype),
        "labels": ids.masked_fill(ids == IMAGE_TOKEN, -100).to(device),
    }
