"""How processors of transformers want texts and images, where they differ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_fast.data.records import IMAGE

if TYPE_CHECKING:
    from PIL.Image import Image

# They put the tokens of an image before the text themselves.
PREPENDING = ("Blip2Processor", "InstructBlipProcessor")


def image_token(processor: Any) -> str:
    """What stands for an image in the text given to this processor; empty where nothing does."""
    if type(processor).__name__ in PREPENDING:
        return ""
    return str(getattr(processor, "image_token", IMAGE))


def trims(processor: Any) -> bool:
    """Whether it cuts off the spaces around an image."""
    return type(processor).__name__ == "IdeficsProcessor"


def brings_beginning(processor: Any) -> bool:
    """Whether it writes the token of the beginning into a text that has none."""
    return type(processor).__name__ == "MllamaProcessor"


def chat_template(processor: Any) -> str | None:
    template = getattr(processor, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def process(
    processor: Any, texts: Sequence[str], images: Sequence[Image | None], **options: Any
) -> dict[str, Any]:
    """Call it with texts and the image of each, or None."""
    name = type(processor).__name__
    if name == "IdeficsProcessor":  # which takes pieces
        prompts = [
            [piece for piece in _around(text, image) if piece]
            for text, image in zip(texts, images, strict=True)
        ]
        return dict(processor(text=prompts, **options))
    given: list[Any] = [image for image in images if image is not None]
    if name == "MllamaProcessor":  # which takes a list for each text
        given = [[image] for image in given]
    return dict(processor(images=given or None, text=list(texts), **options))


def _around(text: str, image: Image | None) -> list[Any]:
    if image is None:
        return [text]
    before, after = re.split(re.escape(IMAGE), text)
    return [before, image, after]
