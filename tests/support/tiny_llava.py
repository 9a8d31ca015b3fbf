"""Small LLaVA models with random weights, and inputs for them."""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE_TOKEN = 7


def llava(size="tiny", dtype=torch.float32, **options):
    """A LLaVA; "real-width" has the connector of LLaVA-1.5-7B, 1024 -> 4096 -> 4096.

    Around it everything is narrow: attention has 4 heads of 16 whatever the hidden size.
    """
    vision, hidden = {"tiny": (48, 64), "real-width": (1024, 4096)}[size]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision, intermediate_size=2 * vision, num_hidden_layers=2,
            num_attention_heads=4, image_size=28, patch_size=7,
        ),
        text_config=LlamaConfig(
            hidden_size=hidden, intermediate_size=96, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=4, head_dim=16, vocab_size=128,
        ),
        **dict(image_token_id=IMAGE_TOKEN, vision_feature_layer=-2) | options,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).to(dtype).eval()


def prompt(dtype=torch.float32, batch=2, tokens=16, length=30):
    """Ids with image placeholders at different positions in each row, and pixels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, 128, (batch, length), generator=generator)
    for row in range(batch):
        ids[row, 3 + row : 3 + row + tokens] = IMAGE_TOKEN
    pixels = torch.randn(batch, 3, 28, 28, generator=generator).to(dtype)
    return dict(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids))
