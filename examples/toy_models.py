"""Models and data for the examples: your own, or a tiny random model with made-up pictures.

Each made-up picture has one colour, and its caption is the name of the colour. That is enough for
a loss to fall within seconds on a CPU.
"""

import torch
from transformers import (
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from vlm_fast.training.data import Captions, Collator, Conversations

SIDE, PATCHES, BEGIN, END, IMAGE, NAMES = 28, 16, 1, 2, 3, 8  # NAMES: the first of 8 colours
SMALL = dict(
    hidden_size=48, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2,
    initializer_range=0.1,  # with the default the pictures hardly change the output
)  # fmt: skip
TOWER = dict(SMALL, image_size=SIDE, patch_size=7)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
QFORMER = dict(SMALL, vocab_size=32, encoder_hidden_size=48, **NO_DROPOUT)


def llava(name: str, data: str, images: str):
    """A LLaVA model, training examples, and a collator (None: the default one stacks them)."""
    if name:
        collator = Collator(AutoProcessor.from_pretrained(name), max_length=2048)
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        model = LlavaForConditionalGeneration.from_pretrained(name, dtype=dtype)
        return model, Conversations(data, images), collator
    torch.manual_seed(0)
    language = dict(SMALL, model_type="llama", num_key_value_heads=4, vocab_size=32)
    vision = dict(TOWER, model_type="clip_vision_model")
    config = LlavaConfig(vision_config=vision, text_config=language, image_token_id=IMAGE)
    return LlavaForConditionalGeneration(config), _colours(before=[IMAGE] * PATCHES), None


def retrieval(name: str, data: str, images: str):
    """A BLIP-2 model for the first stage, pictures with captions, and a collate function."""
    if name:
        processor = AutoProcessor.from_pretrained(name)

        def batch(pairs):
            texts = processor.tokenizer(
                [pair.text for pair in pairs], return_tensors="pt", return_token_type_ids=False,
                padding="max_length", truncation=True, max_length=32,  # the same on all ranks
            )  # fmt: skip
            pixels = processor.image_processor([pair.image for pair in pairs], return_tensors="pt")
            return {**pixels, **texts}

        return Blip2ForImageTextRetrieval.from_pretrained(name), Captions(data, images), batch
    torch.manual_seed(0)
    config = Blip2Config(
        vision_config=TOWER, qformer_config=dict(QFORMER, use_qformer_text_input=True),
        num_query_tokens=8, image_text_hidden_size=32,
    )  # fmt: skip
    pairs = [{k: v for k, v in pair.items() if k != "labels"} for pair in _colours(before=[])]
    return _with_queries(Blip2ForImageTextRetrieval(config)), pairs, None


def blip2(name: str):
    """A BLIP-2 model of the second stage, in eval mode."""
    if name:
        return Blip2ForConditionalGeneration.from_pretrained(name).eval()
    torch.manual_seed(0)
    language = dict(model_type="opt", hidden_size=48, ffn_dim=64, num_attention_heads=4,
                    num_hidden_layers=1, word_embed_proj_dim=48, vocab_size=32)  # fmt: skip
    config = Blip2Config(
        vision_config=TOWER, qformer_config=QFORMER, text_config=language, image_token_index=IMAGE
    )
    return _with_queries(Blip2ForConditionalGeneration(config)).eval()


def _with_queries(model):
    """Initialize the queries at random; transformers initializes all of them with zeros."""
    torch.nn.init.normal_(model.query_tokens)
    return model


def _colours(before: list[int], count: int = 64):
    """Noisy pictures in the 8 colours whose red, green and blue are each fully on or off."""
    colour = torch.arange(count) % 8
    shades = torch.stack([(colour >> k) & 1 for k in range(3)], 1)[..., None, None] * 2.0 - 1
    examples = []
    for pixels, name in zip(shades + 0.1 * torch.randn(count, 3, SIDE, SIDE), colour, strict=True):
        ids = torch.tensor([BEGIN, *before, NAMES + int(name), END])
        labels = torch.where(ids < NAMES, -100, ids)
        mask = torch.ones_like(ids)
        examples.append(
            dict(input_ids=ids, attention_mask=mask, labels=labels, pixel_values=pixels)
        )
    return examples
