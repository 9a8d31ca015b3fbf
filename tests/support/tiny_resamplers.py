"""Small Idefics2 and Kosmos models of transformers, with random weights."""

import copy

import torch
import transformers

from tests.support.older_configs import adapted_config
from tests.support.tiny_models import CLIP, IMAGE, TEXT, VISION, image_sets

LATENTS = 5


def randomised_parameters(model):
    """Randomise parameters, since biases at 0 and norms at 1 would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def idefics2(attention="eager"):
    """A model with two images of which one is padded, and its inputs."""
    torch.manual_seed(0)
    config = transformers.Idefics2Config(
        vision_config=dict(VISION),
        perceiver_config=dict(
            resampler_n_latents=LATENTS, resampler_depth=2, resampler_n_heads=4,
            resampler_head_dim=12, num_key_value_heads=2,
        ),
        text_config=adapted_config(TEXT | dict(model_type="mistral", head_dim=8)),
        image_token_id=IMAGE, attn_implementation=attention,
    )  # fmt: skip
    model = randomised_parameters(transformers.Idefics2ForConditionalGeneration(config))
    ids = torch.tensor([[5, 6, *[IMAGE] * LATENTS, 7, 8], [9, *[IMAGE] * LATENTS, 10, 11, 12]])
    shown = torch.ones(2, 1, 16, 16, dtype=torch.long)
    shown[1, :, :, 8:] = 0
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_attention_mask=shown)
    return model, inputs | image_sets()


def _kosmos(version, vision, text, pixels):
    torch.manual_seed(0)
    text = dict(
        vocab_size=99, layers=2, attention_heads=4, dropout=0.0, attention_dropout=0.0,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    ) | text  # fmt: skip
    config = getattr(transformers, f"Kosmos2{version}Config")(
        vision_config=vision, text_config=text, latent_query_num=LATENTS,
        attn_implementation="eager",
    )  # fmt: skip
    name = f"Kosmos2{version}ForConditionalGeneration"
    model = randomised_parameters(getattr(transformers, name)(config))
    for module in model.modules():
        if hasattr(module, "config"):  # of the text, which some releases do not tell
            module.config._attn_implementation = "eager"
    ids = torch.randint(3, 99, (2, 12))
    places = torch.zeros(2, 12, dtype=torch.long)
    places[0, 1 : 1 + LATENTS] = places[1, 3 : 3 + LATENTS] = 1
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    return model, inputs | pixels | dict(image_embeds_position_mask=places)


def kosmos2():
    """A model with eager attention, and its inputs."""
    vision = {name: value for name, value in CLIP.items() if name != "model_type"}
    pixels = dict(pixel_values=torch.randn(2, 3, 16, 16))
    return _kosmos("", vision, dict(embed_dim=32, ffn_dim=48), pixels)


def kosmos2_5():
    """A Kosmos-2.5 model, whose inputs are flattened patches with row and column numbers."""
    vision = dict(
        hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        head_dim=12, patch_embed_hidden_size=48, max_num_patches=16, dropout_rate=0.0,
        attention_dropout=0.0,
    )  # fmt: skip
    places = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5)).float()
    patches = torch.cat([places.expand(2, -1, -1), torch.randn(2, 16, 48)], dim=2)
    return _kosmos("_5", vision, dict(embed_dim=32, ffn_dim=48), dict(flattened_patches=patches))


def of_sdpa(model):
    """A model with transformers' default attention in the resampler, which returns no maps.

    For Kosmos-2 this attention is wrong: it crops the keys.
    """
    attention = model.image_to_text_projection.x_attn
    if not hasattr(attention, "config"):
        raise NotImplementedError("its attention is always eager")
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "sdpa"
    return model
