"""Format a conversation as training text, with the character ranges of the answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_fast.training.data.processors import (
    adds_missing_bos,
    chat_template,
    image_token,
    removes_spaces_around_image,
    text_added_by,
    writes_space_after_image,
)
from vlm_fast.training.data.records import IMAGE_PLACEHOLDER

if TYPE_CHECKING:
    from vlm_fast.training.data.datasets import Example

# System prompt of Vicuna, with which LLaVA v1 was trained: FastChat, conversation "vicuna_v1.1"
# (Apache-2.0).
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
CHAT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class FormattedText:
    """A text and the character ranges in it that are learned.

    Attributes:
        text: the text given to the processor.
        answers: (start, end) of each range.
    """

    text: str
    answers: tuple[tuple[int, int], ...]

    def with_prefix(self, beginning: str) -> FormattedText:
        """Add ``beginning`` in front, unless the text already starts with it."""
        return self if self.text.startswith(beginning) else self.with_insertion(beginning, 0)

    def with_insertion(self, words: str, at: int) -> FormattedText:
        """Insert ``words`` at position ``at``, which must lie outside the answers."""
        longer = len(words)
        answers = tuple(
            (start + longer, end + longer) if start >= at else (start, end)
            for start, end in self.answers
        )
        return FormattedText(self.text[:at] + words + self.text[at:], answers)

    def stripped(self) -> FormattedText:
        """Remove whitespace at both ends."""
        text = self.text.strip()
        shorter = self.text.index(text)
        answers = (
            (max(0, start - shorter), min(len(text), end - shorter)) for start, end in self.answers
        )
        return FormattedText(text, tuple(answers))

    def without_spaces_around(self, token: str) -> FormattedText:
        """Remove the spaces around the first occurrence of ``token``, if there is one."""
        found = re.search(f" *{re.escape(token)} *", self.text)
        if found is None:
            return self
        shorter = len(found.group()) - len(token)
        return FormattedText(
            self.text[: found.start()] + token + self.text[found.end() :],
            tuple(
                (start - shorter, end - shorter) if start >= found.end() else (start, end)
                for start, end in self.answers
            ),
        )


Format = Callable[["Example", Any], FormattedText]


def plain(example: Example, processor: Any) -> FormattedText:
    """Format of LLaVA's first stage: the image, its caption and a newline.

    The question is dropped. The caption is the first answer of the conversation.

    Raises:
        ValueError: the example has no image.
    """
    if example.image is None:
        raise ValueError("the plain format is of images with captions, expected an image")
    placeholder = image_token(processor)
    text = f"{placeholder}{example.turns[1].text}\n"
    return FormattedText(text, ((len(placeholder), len(text)),))


def v1(example: Example, processor: Any) -> FormattedText:
    """Format of LLaVA v1's and v1.5's second stage: Vicuna's prompt with ``USER:`` and
    ``ASSISTANT:``.

    The image is moved to the beginning of its question. The learned range of an answer starts at
    the space after ``ASSISTANT:`` and includes the end-of-sequence token.
    """
    end = processor.tokenizer.eos_token
    text, answers = SYSTEM, []
    for turn in example.turns:
        if turn.role == "human":
            words = turn.text
            if IMAGE_PLACEHOLDER in words:
                words = f"{image_token(processor)}\n{without_placeholder(words)}".strip()
            text += f"{'' if text.endswith(end) else ' '}USER: {words} ASSISTANT: "
        else:
            answers.append((len(text), len(text) + len(turn.text) + len(end)))
            text += turn.text + end
    return FormattedText(text, tuple(answers))


def chat(example: Example, processor: Any) -> FormattedText:
    """The processor's chat template, with the image moved to the beginning of its question.

    The learned ranges are what the template puts between ``{% generation %}`` and ``{%
    endgeneration %}``. Without these marks they are what a turn of the assistant adds to the text
    after the generation prompt.

    Raises:
        ValueError: the template has no such marks, and renders earlier turns differently when more
            turns follow.
    """
    messages = []
    for turn in example.turns:
        content = [{"type": "text", "text": without_placeholder(turn.text)}]
        if turn.role == "human" and IMAGE_PLACEHOLDER in turn.text:
            content.insert(0, {"type": "image"})
        messages.append({"role": CHAT_ROLES[turn.role], "content": content})
    if GENERATION.search(template := chat_template(processor) or ""):
        from transformers.utils.chat_template_utils import render_jinja_template

        # apply_chat_template is not used here: it searches for the ranges after the image is
        # expanded.
        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **processor.tokenizer.special_tokens_map,
        )
        texts, spans = rendered
        return FormattedText(texts[0], tuple(spans[0]))

    def rendered_turns(count: int, prompt: bool = False) -> str:
        return processor.apply_chat_template(
            messages[:count], chat_template=template, add_generation_prompt=prompt
        )

    text, answers = rendered_turns(len(messages)), []
    for number in range(1, len(messages), 2):
        before, after = rendered_turns(number, prompt=True), rendered_turns(number + 1)
        if not (text.startswith(after) and after.startswith(before)):
            raise ValueError(
                "processor: its chat template writes a turn otherwise once others follow; mark the "
                "answers in it by {% generation %} and {% endgeneration %}"
            )
        answers.append((len(before), len(after)))
    return FormattedText(text, tuple(answers))


FORMATS: dict[str, Format] = {"plain": plain, "v1": v1, "chat": chat}


def format_example(example: Example, processor: Any, format: str) -> FormattedText:
    """Format an example as the processor expects it, with everything but the tokens of an image.

    Args:
        format: a name in `FORMATS`.
    """
    formatted = FORMATS[format](example, processor)
    if removes_spaces_around_image(processor):
        formatted = formatted.without_spaces_around(image_token(processor))
    if adds_missing_bos(processor) and processor.tokenizer.bos_token is not None:
        formatted = formatted.with_prefix(processor.tokenizer.bos_token)
    if example.image is not None and writes_space_after_image(processor):
        formatted = formatted.stripped().with_insertion(" ", 0)
    words, token = text_added_by(processor), image_token(processor)
    if words.after_image and token in formatted.text:
        formatted = formatted.with_insertion(
            words.after_image, formatted.text.index(token) + len(token)
        )
    return formatted.with_insertion(words.end, len(formatted.text)).with_insertion(
        words.beginning, 0
    )


def without_placeholder(text: str) -> str:
    """Remove the image placeholder and the whitespace around the rest."""
    return text.replace(IMAGE_PLACEHOLDER, "").strip() if IMAGE_PLACEHOLDER in text else text
