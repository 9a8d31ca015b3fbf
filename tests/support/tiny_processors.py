"""transformers processors with a tokenizer trained on the photographs' captions."""

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Blip2Processor,
    IdeficsProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from tests.support.photographs import CAPTION_QUESTION, PHOTOGRAPHS
from tests.support.tiny_llava import IMAGE_TOKEN

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|image|>", "<fake_token_around_image>",
           "<end_of_utterance>", "<image>"]  # fmt: skip
assert SPECIAL[IMAGE_TOKEN] == "<image>"

# As LLaVA's on the hub: images first, answers marked, a space after each turn.
CHAT = """{% for message in messages %}{{ message['role'].upper() + ': ' }}\
{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}\
{% for part in message['content'] if part['type'] == 'text' %}\
{% if message['role'] == 'assistant' %}\
{% generation %}{{ part['text'] + eos_token + ' ' }}{% endgeneration %}\
{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
UNMARKED = CHAT.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@functools.cache
def _trained(vocabulary, merging):
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.decoder = decoders.Fuse()
    if not merging:
        # As Llama's: words with the space before them.
        trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        trained.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=[chr(code) for code in (10, *range(32, 127))],
    )  # fmt: skip
    texts = [
        f"USER: {question} ASSISTANT: {answer}"
        for caption, others in PHOTOGRAPHS.values()
        for question, answer in [(CAPTION_QUESTION, caption), *others]
    ]
    trained.train_from_iterator(texts, trainer)
    trained.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    return trained


def tokenizer(vocabulary=128, *, merging=False):
    """One of 128 tokens, as many as tiny_llava.py has; ``<image>`` has the same number there.

    ``merging`` merges whatever is frequent, over the ends of words and of questions.
    """
    copy = Tokenizer.from_str(_trained(vocabulary, merging).to_str())
    return PreTrainedTokenizerFast(
        tokenizer_object=copy, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>",
    )  # fmt: skip


def llava(words=None, **options):
    """Of tiny_llava.py: 28 pixels, 16 tokens an image. No chat template unless given."""
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    return LlavaProcessor(
        pictures, words or tokenizer(), patch_size=7, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, **options,
    )  # fmt: skip


def llava_next(words=None, **options):
    """Tiles of 28 pixels, in grids of up to 2 by 2."""
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )  # fmt: skip
    return LlavaNextProcessor(
        pictures, words or tokenizer(), patch_size=7, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, **options,
    )  # fmt: skip


def blip2(words=None, queries=4):
    pictures = BlipImageProcessorPil(size={"height": 28, "width": 28})
    return Blip2Processor(pictures, words or tokenizer(), num_query_tokens=queries)


def idefics(words=None):
    return IdeficsProcessor(IdeficsImageProcessorPil(image_size=28), words or tokenizer())


def mllama(words=None, **options):
    pictures = MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=2)
    return MllamaProcessor(pictures, words or tokenizer(), **options)
