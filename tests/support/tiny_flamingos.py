"""Small IDEFICS and Llama 3.2 Vision models of transformers, with random weights and open gates."""

import torch
import transformers

from tests.support.older_configs import adapted_config


def _randomised(model):
    """Randomise parameters, since gates at 0 and norms at 1 would hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name.split(".")[-1] or "alpha" in name:
                parameter.copy_(torch.linspace(0.3, 0.9, parameter.numel()).view(parameter.shape))
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def idefics(attention="eager", **changes):
    torch.manual_seed(0)
    config = transformers.IdeficsConfig(**dict(
        vocab_size=99, additional_vocab_size=0, hidden_size=64, intermediate_size=80,
        num_hidden_layers=4, num_attention_heads=4, cross_layer_interval=2, qk_layer_norms=True,
        alpha_initializer="ones", freeze_text_layers=False, freeze_vision_layers=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=None, use_resampler=True,
        vision_config=dict(
            embed_dim=40, image_size=16, patch_size=4, num_attention_heads=4, num_hidden_layers=1,
            intermediate_size=48,
        ),
        perceiver_config=dict(
            resampler_n_latents=6, resampler_depth=2, resampler_n_heads=2, resampler_head_dim=24,
            qk_layer_norms_perceiver=True,
        ),
        attn_implementation=attention,
    ) | changes)  # fmt: skip
    return _randomised(transformers.IdeficsForVisionText2Text(config))


def idefics_inputs(images=3, tokens=11):
    """Two rows: text before the first image, and images that come one after the other."""
    torch.manual_seed(1)
    seen = torch.zeros(2, tokens, images, dtype=torch.long)
    seen[0, 2:6, 0] = seen[0, 6:, :2] = 1
    seen[1, 0:, 1] = seen[1, 4:, 2] = 1
    return dict(
        input_ids=torch.randint(2, 99, (2, tokens)), image_attention_mask=seen,
        attention_mask=torch.ones(2, tokens, dtype=torch.long),
        pixel_values=torch.randn(2, images, 3, 16, 16),
    )  # fmt: skip


def mllama(attention="eager", **changes):
    torch.manual_seed(0)
    text = dict(
        vocab_size=99, hidden_size=64, intermediate_size=80, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, cross_attention_layers=[1, 3],
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        rope_parameters=dict(rope_type="default", rope_theta=1e4),
    ) | changes  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_global_layers=1,
        attention_heads=2, image_size=16, patch_size=4, vision_output_dim=64,
        intermediate_layers_indices=[0], max_num_tiles=2,
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )  # fmt: skip
    config = transformers.MllamaConfig(
        vision_config=vision, text_config=adapted_config(text), attn_implementation=attention
    )
    return _randomised(transformers.MllamaForConditionalGeneration(config))


def mllama_inputs(images=2, tokens=11):
    """Two rows: the first token sees nothing; a tile is hidden; a second image comes later."""
    torch.manual_seed(1)
    mask = torch.zeros(2, tokens, images, 2, dtype=torch.long)
    mask[0, 1:, 0] = mask[0, 6:, 1, 0] = 1
    mask[1, 3:, 0, 1] = mask[1, 3:, 1] = 1
    return dict(
        input_ids=torch.randint(2, 99, (2, tokens)), cross_attention_mask=mask,
        attention_mask=torch.ones(2, tokens, dtype=torch.long),
        pixel_values=torch.randn(2, images, 2, 3, 16, 16),
        aspect_ratio_mask=torch.ones(2, images, 2, dtype=torch.long),
        aspect_ratio_ids=torch.full((2, images), 2),
    )  # fmt: skip
