"""How processors of transformers want texts and images, where they differ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_fast.training.data.records import IMAGE

if TYPE_CHECKING:
    from PIL.Image import Image

# They put the tokens of an image before the text themselves.
PREPENDING = (
    "Blip2Processor", "InstructBlipProcessor", "Kosmos2Processor", "Kosmos2_5Processor",
)  # fmt: skip
# Of these, such that write the token of the beginning there too, whatever the tokenizer does.
BEGUN = ("Kosmos2Processor", "Kosmos2_5Processor")
# They take a list of images for each text.
NESTED = ("Gemma3Processor", "Gemma3nProcessor", "SmolVLMProcessor", "Lfm2VlProcessor")
# No row of theirs holds a question and its answer.
NO_ROWS = {
    "Florence2Processor": "its model reads the question by an encoder and learns the answer by a "
    "decoder",
    "FuyuProcessor": "it pads on the left, and ends each text with the token that asks for an "
    "answer",
}


def _is(processor: Any, *names: str) -> bool:
    """Whether its class is one of these, or made from one."""
    return not {kind.__name__ for kind in type(processor).__mro__}.isdisjoint(names)


def why_no_rows(processor: Any) -> str | None:
    """Why pictures with conversations cannot be made inputs by it; None if they can."""
    if getattr(processor, "image_processor", None) is None:
        return "it takes no images"
    return next((why for name, why in NO_ROWS.items() if _is(processor, name)), None)


def image_token(processor: Any) -> str:
    """What stands for an image in the text given to this processor; empty where nothing does."""
    if _is(processor, *PREPENDING):
        return ""
    return str(getattr(processor, "image_token", IMAGE))


def trims(processor: Any) -> bool:
    """Whether it cuts off the spaces around an image."""
    return _is(processor, "IdeficsProcessor")


def brings_beginning(processor: Any) -> bool:
    """Whether it writes the token of the beginning into a text that has none."""
    return _is(processor, "MllamaProcessor")


class Added(NamedTuple):
    """What a processor itself writes into each text: at its ends, and after the image."""

    beginning: str = ""
    after_image: str = ""
    end: str = ""


def added(processor: Any) -> Added:
    """What it writes itself, whatever the text has there already."""
    tokenizer = processor.tokenizer
    if _is(processor, "PaliGemmaProcessor"):
        return Added(after_image=tokenizer.bos_token, end="\n")
    if _is(processor, "ChameleonProcessor"):
        return Added(end=tokenizer.sep_token)
    return Added(beginning=tokenizer.bos_token) if _is(processor, "Emu3Processor") else Added()


def begins_itself(processor: Any) -> bool:
    """Whether it writes the token of the beginning before the image that it puts first."""
    return _is(processor, *BEGUN)


def sets_apart(processor: Any) -> bool:
    """Whether it puts a space between the image that it puts first and the text, trimmed."""
    return _is(processor, "Kosmos2Processor")


def types_answers(processor: Any) -> bool:
    """Whether its model attends both ways to all of ``token_type_ids`` 0, and none of an answer."""
    return _is(processor, "PaliGemmaProcessor")


def special_tokens(processor: Any) -> dict[str, bool]:
    """What it asks its tokenizer for, where that is not the tokenizer's own."""
    return {"add_special_tokens": False} if _is(processor, "Lfm2VlProcessor") else {}


def chat_template(processor: Any) -> str | None:
    template = getattr(processor, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def process(
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
    elif given and _is(processor, *NESTED):
        given = [[] if image is None else [image] for image in images]
    texts = [_without(added(processor), text, image_token(processor)) for text in texts]
    return dict(processor(images=given or None, text=list(texts), **options))


def _without(words: Added, text: str, token: str) -> str:
    """The text as ``formats.write`` had it before it put these words in."""
    text = text.removeprefix(words.beginning).removesuffix(words.end)
    return text.replace(f"{token}{words.after_image}", token) if token else text


def _around(text: str, image: Image | None) -> list[Any]:
    if image is None:
        return [text]
    before, after = re.split(re.escape(IMAGE), text)
    return [before, image, after]
