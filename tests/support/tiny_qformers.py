"""transformers Q-Formers: small, or with default widths and few layers."""

import copy

import torch
import transformers
from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

SMALL = dict(
    hidden_size=48, num_attention_heads=3, intermediate_size=80, num_hidden_layers=3,
    encoder_hidden_size=40, vocab_size=99,
)  # fmt: skip


def blip2(implementation="sdpa", *, text=False, seed=0, **sizes):
    torch.manual_seed(seed)
    sizes.pop("vocab_size", None)
    config = Blip2QFormerConfig(**sizes, use_qformer_text_input=text)
    return randomised_parameters(
        Blip2QFormerModel._from_config(config, attn_implementation=implementation)
    )


def instructblip(implementation="sdpa", *, seed=0, **sizes):
    torch.manual_seed(seed)
    config = InstructBlipQFormerConfig(**sizes)
    return randomised_parameters(
        InstructBlipQFormerModel._from_config(config, attn_implementation=implementation)
    )


def randomised_parameters(model):
    """Randomise biases and norm weights, which are initially 0 and 1."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def images(batch, keys, width):
    return torch.randn(batch, keys, width)


def ones_but(batch, length, *hidden):
    """An attention mask that hides the last tokens of some rows: ``(row, count)``."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row, count in hidden:
        mask[row, length - count :] = 0
    return mask


def outputs_and_gradients(model, inputs, dtype):
    """The last hidden state, and the gradients of parameters and floating inputs."""
    model = copy.deepcopy(model).to(dtype)
    given = {
        name: value.detach().clone().to(dtype).requires_grad_()
        if value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    out = model(**given).last_hidden_state
    generator = torch.Generator().manual_seed(7)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype))
    leaves = dict(model.named_parameters()) | given
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.is_floating_point()}
    return {"output": out.detach()} | found


# ---- whole models ----

VISION = dict(hidden_size=40, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
              image_size=16, patch_size=4)  # fmt: skip
QFORMER = {**SMALL, "num_hidden_layers": 2}
TEXT = dict(model_type="opt", hidden_size=32, ffn_dim=48, num_hidden_layers=1, vocab_size=99,
            num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32)  # fmt: skip
FAMILIES = {
    "Blip2ForConditionalGeneration": transformers.Blip2Config,
    "InstructBlipForConditionalGeneration": transformers.InstructBlipConfig,
    "InstructBlipVideoForConditionalGeneration": transformers.InstructBlipVideoConfig,
}


def whole(name):
    torch.manual_seed(0)
    config = FAMILIES[name](
        vision_config=VISION, qformer_config=QFORMER, text_config=TEXT, num_query_tokens=5,
        image_token_index=98, image_token_id=98, video_token_index=98, video_token_id=98,
    )  # fmt: skip
    model = randomised_parameters(getattr(transformers, name)(config))
    model.query_tokens.data.normal_()
    frames = (2,) if "Video" in name else ()
    ids = torch.tensor([[98] * 5 * (frames or (1,))[0] + [4, 5, 6]]).repeat(2, 1)
    inputs = dict(
        pixel_values=torch.randn(2, *frames, 3, 16, 16), input_ids=ids,
        attention_mask=torch.ones_like(ids),
    )  # fmt: skip
    if "Instruct" in name:
        inputs["qformer_input_ids"] = torch.randint(1, 90, (2, 4))
        inputs["qformer_attention_mask"] = ones_but(2, 4, (1, 2))
    return model, inputs
