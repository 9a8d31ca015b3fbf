"""Differences between transformers' processors in how they take texts and images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_fast.training.data.records import IMAGE_PLACEHOLDER

if TYPE_CHECKING:
    from PIL.Image import Image

# These put the tokens of an image before the text.
IMAGE_FIRST = (
    "Blip2Processor", "InstructBlipProcessor", "Kosmos2Processor", "Kosmos2_5Processor",
)  # fmt: skip
# Those of them that also add the beginning-of-sequence token, independent of the tokenizer.
BOS_BEFORE_IMAGE = ("Kosmos2Processor", "Kosmos2_5Processor")
# These take one list of images per text.
IMAGES_PER_TEXT = ("Gemma3Processor", "Gemma3nProcessor", "SmolVLMProcessor", "Lfm2VlProcessor")
# These have no input that contains a question and its answer, with the reason.
UNSUPPORTED = {
    "Florence2Processor": "its model reads the question by an encoder and learns the answer by a "
    "decoder",
    "FuyuProcessor": "it pads on the left, and ends each text with the token that asks for an "
    "answer",
}


def _is(processor: Any, *names: str) -> bool:
    """Whether the class of a processor is one of these or a subclass."""
    return not {kind.__name__ for kind in type(processor).__mro__}.isdisjoint(names)


def why_unsupported(processor: Any) -> str | None:
    """The reason why a processor cannot make inputs of images with conversations, or None."""
    if getattr(processor, "image_processor", None) is None:
        return "it takes no images"
    return next((why for name, why in UNSUPPORTED.items() if _is(processor, name)), None)


def image_token(processor: Any) -> str:
    """The text that stands for an image in this processor's input; empty if nothing does."""
    if _is(processor, *IMAGE_FIRST):
        return ""
    return str(getattr(processor, "image_token", IMAGE_PLACEHOLDER))


def removes_spaces_around_image(processor: Any) -> bool:
    """Whether the processor removes the spaces around an image."""
    return _is(processor, "IdeficsProcessor")


def adds_missing_bos(processor: Any) -> bool:
    """Whether the processor adds the beginning-of-sequence token to a text that has none."""
    return _is(processor, "MllamaProcessor")


class AddedText(NamedTuple):
    """The text that a processor adds to each input: at its ends, and after the image."""

    beginning: str = ""
    after_image: str = ""
    end: str = ""


def text_added_by(processor: Any) -> AddedText:
    """The text that a processor adds, even if the input already contains it."""
    tokenizer = processor.tokenizer
    if _is(processor, "PaliGemmaProcessor"):
        return AddedText(after_image=tokenizer.bos_token, end="\n")
    if _is(processor, "ChameleonProcessor"):
        return AddedText(end=tokenizer.sep_token)
    return (
        AddedText(beginning=tokenizer.bos_token) if _is(processor, "Emu3Processor") else AddedText()
    )


def writes_bos_before_image(processor: Any) -> bool:
    """Whether the processor adds the beginning-of-sequence token before the image."""
    return _is(processor, *BOS_BEFORE_IMAGE)


def writes_space_after_image(processor: Any) -> bool:
    """Whether the processor puts a space between the image and the stripped text."""
    return _is(processor, "Kosmos2Processor")


def marks_answers_by_type(processor: Any) -> bool:
    """Whether ``token_type_ids`` select causal attention: 0 is attended in both directions."""
    return _is(processor, "PaliGemmaProcessor")


def tokenizer_options(processor: Any) -> dict[str, bool]:
    """The options that a processor passes to its tokenizer, if they differ from the defaults."""
    return {"add_special_tokens": False} if _is(processor, "Lfm2VlProcessor") else {}


def chat_template(processor: Any) -> str | None:
    """The default chat template of a processor, or None."""
    template = getattr(processor, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def call_processor(
    processor: Any, texts: Sequence[str], images: Sequence[Image | None], **options: Any
) -> dict[str, Any]:
    """Call a processor with formatted texts and the image of each text.

    Args:
        texts: results of `chat_formats.format_example`.
        images: one image or None per text.
        options: of the processor.
    """
    if _is(processor, "IdeficsProcessor"):  # takes lists of texts and images
        prompts = [
            [piece for piece in _around(text, image) if piece]
            for text, image in zip(texts, images, strict=True)
        ]
        return dict(processor(text=prompts, **options))
    given: list[Any] = [image for image in images if image is not None]
    if _is(processor, "MllamaProcessor"):  # takes one list per text with an image
        given = [[image] for image in given]
    elif given and _is(processor, *IMAGES_PER_TEXT):
        given = [[] if image is None else [image] for image in images]
    texts = [_without(text_added_by(processor), text, image_token(processor)) for text in texts]
    return dict(processor(images=given or None, text=list(texts), **options))


def _without(words: AddedText, text: str, token: str) -> str:
    """Remove the text that the processor will add itself."""
    text = text.removeprefix(words.beginning).removesuffix(words.end)
    return text.replace(f"{token}{words.after_image}", token) if token else text


def _around(text: str, image: Image | None) -> list[Any]:
    if image is None:
        return [text]
    before, after = re.split(re.escape(IMAGE_PLACEHOLDER), text)
    return [before, image, after]
