"""How processors of transformers want texts and images, where they differ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_fast.training.data.records import IMAGE_PLACEHOLDER

if TYPE_CHECKING:
    from PIL.Image import Image

# They put the tokens of an image before the text themselves.
IMAGE_FIRST = (
    "Blip2Processor", "InstructBlipProcessor", "Kosmos2Processor", "Kosmos2_5Processor",
)  # fmt: skip
# Of these, such that write the token of the beginning there too, whatever the tokenizer does.
BOS_BEFORE_IMAGE = ("Kosmos2Processor", "Kosmos2_5Processor")
# They take a list of images for each text.
IMAGES_PER_TEXT = ("Gemma3Processor", "Gemma3nProcessor", "SmolVLMProcessor", "Lfm2VlProcessor")
# No row of theirs holds a question and its answer.
UNSUPPORTED = {
    "Florence2Processor": "its model reads the question by an encoder and learns the answer by a "
    "decoder",
    "FuyuProcessor": "it pads on the left, and ends each text with the token that asks for an "
    "answer",
}


def _is(processor: Any, *names: str) -> bool:
    """Whether its class is one of these, or made from one."""
    return not {kind.__name__ for kind in type(processor).__mro__}.isdisjoint(names)


def why_unsupported(processor: Any) -> str | None:
    """Why pictures with conversations cannot be made inputs by it; None if they can."""
    if getattr(processor, "image_processor", None) is None:
        return "it takes no images"
    return next((why for name, why in UNSUPPORTED.items() if _is(processor, name)), None)


def image_token(processor: Any) -> str:
    """What stands for an image in the text given to this processor; empty where nothing does."""
    if _is(processor, *IMAGE_FIRST):
        return ""
    return str(getattr(processor, "image_token", IMAGE_PLACEHOLDER))


def removes_spaces_around_image(processor: Any) -> bool:
    """Whether it cuts off the spaces around an image."""
    return _is(processor, "IdeficsProcessor")


def adds_missing_bos(processor: Any) -> bool:
    """Whether it writes the token of the beginning into a text that has none."""
    return _is(processor, "MllamaProcessor")


class AddedText(NamedTuple):
    """What a processor itself writes into each text: at its ends, and after the image."""

    beginning: str = ""
    after_image: str = ""
    end: str = ""


def text_added_by(processor: Any) -> AddedText:
    """What it writes itself, whatever the text has there already."""
    tokenizer = processor.tokenizer
    if _is(processor, "PaliGemmaProcessor"):
        return AddedText(after_image=tokenizer.bos_token, end="\n")
    if _is(processor, "ChameleonProcessor"):
        return AddedText(end=tokenizer.sep_token)
    return (
        AddedText(beginning=tokenizer.bos_token) if _is(processor, "Emu3Processor") else AddedText()
    )


def writes_bos_before_image(processor: Any) -> bool:
    """Whether it writes the token of the beginning before the image that it puts first."""
    return _is(processor, *BOS_BEFORE_IMAGE)


def writes_space_after_image(processor: Any) -> bool:
    """Whether it puts a space between the image that it puts first and the text, trimmed."""
    return _is(processor, "Kosmos2Processor")


def marks_answers_by_type(processor: Any) -> bool:
    """Whether its model attends both ways to all of ``token_type_ids`` 0, and none of an answer."""
    return _is(processor, "PaliGemmaProcessor")


def tokenizer_options(processor: Any) -> dict[str, bool]:
    """What it asks its tokenizer for, where that is not the tokenizer's own."""
    return {"add_special_tokens": False} if _is(processor, "Lfm2VlProcessor") else {}


def chat_template(processor: Any) -> str | None:
    template = getattr(processor, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def call_processor(
    processor: Any, texts: Sequence[str], images: Sequence[Image | None], **options: Any
) -> dict[str, Any]:
    """Call it with texts, as ``formats.write`` gives them, and the image of each, or None."""
    if _is(processor, "IdeficsProcessor"):  # which takes pieces
        prompts = [
            [piece for piece in _around(text, image) if piece]
            for text, image in zip(texts, images, strict=True)
        ]
        return dict(processor(text=prompts, **options))
    given: list[Any] = [image for image in images if image is not None]
    if _is(processor, "MllamaProcessor"):  # which takes a list for each text that has one
        given = [[image] for image in given]
    elif given and _is(processor, *IMAGES_PER_TEXT):
        given = [[] if image is None else [image] for image in images]
    texts = [_without(text_added_by(processor), text, image_token(processor)) for text in texts]
    return dict(processor(images=given or None, text=list(texts), **options))


def _without(words: AddedText, text: str, token: str) -> str:
    """The text as ``formats.write`` had it before it put these words in."""
    text = text.removeprefix(words.beginning).removesuffix(words.end)
    return text.replace(f"{token}{words.after_image}", token) if token else text


def _around(text: str, image: Image | None) -> list[Any]:
    if image is None:
        return [text]
    before, after = re.split(re.escape(IMAGE_PLACEHOLDER), text)
    return [before, image, after]
