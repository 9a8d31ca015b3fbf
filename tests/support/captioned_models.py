"""Small models of four families, and their inputs made of the captioned photographs."""

from functools import cache

import torch
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from tests.support import tiny_blip2, tiny_flamingos, tiny_llava
from tests.support.photographs import PHOTOGRAPHS, photograph

BEGIN, END, FIRST_WORD = 1, 2, 8
SIDE = 28
SQUARE = dict(height=SIDE, width=SIDE)


@cache
def pictures():
    return [photograph(name) for name in PHOTOGRAPHS]


def captions(*before):
    """Ids of ``before`` and then of each caption, with labels only on the caption."""
    split = [caption.replace(",", " ,").split() for caption, _ in PHOTOGRAPHS.values()]
    known = sorted({word for words in split for word in words})
    number = {word: FIRST_WORD + i for i, word in enumerate(known)}
    rows = [[*before, BEGIN, *map(number.get, words), END] for words in split]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = torch.tensor(row)
    mask = (ids != 0).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : len(before) + 1] = -100
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def llava():
    processor = CLIPImageProcessorPil(size=dict(shortest_edge=SIDE), crop_size=SQUARE)
    pixels = processor(pictures(), return_tensors="pt").pixel_values
    placeholders = [tiny_llava.IMAGE_TOKEN] * 16
    return tiny_llava.llava(), captions(*placeholders) | dict(pixel_values=pixels)


def blip2():
    """Weights are enlarged so that features matter: the tower's initial ones are 1e-10."""
    image = 7
    model = tiny_blip2.generative(
        vision=dict(image_size=SIDE, patch_size=7, hidden_size=32, initializer_range=0.2),
        qformer=dict(
            hidden_size=48, intermediate_size=80, encoder_hidden_size=32, initializer_range=0.1
        ),
        text=dict(
            vocab_size=99, hidden_size=48, word_embed_proj_dim=48, ffn_dim=64,
            activation_function="gelu",
        ),
        image_token_index=image,
    )  # fmt: skip
    pixels = BlipImageProcessorPil(size=SQUARE)(pictures(), return_tensors="pt").pixel_values
    return model, captions(*[image] * tiny_blip2.QUERIES) | dict(pixel_values=pixels)


def idefics():
    model = tiny_flamingos.idefics(
        num_hidden_layers=2, cross_layer_interval=1, initializer_range=0.05,
        vision_config=dict(
            embed_dim=40, image_size=SIDE, patch_size=7, num_attention_heads=4,
            num_hidden_layers=1, intermediate_size=48,
        ),
    )  # fmt: skip
    pixels = IdeficsImageProcessorPil(image_size=SIDE)(pictures(), return_tensors="pt")
    text = captions()
    return model, text | dict(
        pixel_values=pixels[:, None],
        image_attention_mask=torch.ones_like(text["input_ids"])[..., None],
    )


def mllama():
    """One or two tiles of 16 pixels, by the photograph's shape; each word attends to all tiles."""
    processor = MllamaImageProcessorPil(
        size=dict(height=16, width=16), max_image_tiles=2,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    found = processor([[picture] for picture in pictures()], return_tensors="pt")
    del found["num_tiles"]
    text = captions()
    seen = found["aspect_ratio_mask"][:, None].repeat(1, text["input_ids"].shape[1], 1, 1)
    model = tiny_flamingos.mllama(
        num_hidden_layers=2, cross_attention_layers=[1], initializer_range=0.1
    )
    return model, text | dict(found, cross_attention_mask=seen)


FAMILIES = dict(llava=llava, blip2=blip2, idefics=idefics, mllama=mllama)
