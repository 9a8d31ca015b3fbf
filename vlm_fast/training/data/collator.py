"""Collator for conversations: the inputs of a model, with labels on the answers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from vlm_fast.training.data.chat_formats import FORMATS, FormattedText, format_example
from vlm_fast.training.data.datasets import Example
from vlm_fast.training.data.processors import (
    call_processor,
    chat_template,
    image_token,
    marks_answers_by_type,
    tokenizer_options,
    why_unsupported,
    writes_bos_before_image,
)
from vlm_fast.training.data.record_errors import BadRecord, RecordIssue, describe
from vlm_fast.training.data.replacement_items import collate_or_replace

IGNORED = -100
# Results of transformers' processors that have one value per token of a row.
BY_TOKEN = (
    "input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids",
    "image_attention_mask", "cross_attention_mask", "image_embeds_position_mask",
)  # fmt: skip


class Collator:
    """Turns a list of ``Example`` into the processor's inputs and ``labels``.

    The text is tokenised twice: by the processor, and by its tokenizer with character offsets. Both
    must give the same tokens before and after the image, so that no label is shifted. A token is
    learned if it lies within an answer, or if it contains a character of an answer that is not
    whitespace; a tokenizer can merge the end of the prompt with the beginning of the answer.

    Args:
        processor: of transformers, with a fast tokenizer that has a padding token.
        format: "chat" for the processor's chat template, "v1" or "plain" for LLaVA's formats of its
            two stages. None uses the template if there is one, else "v1".
        max_length: maximal tokens of a row, including images; the rest is cut off at the end.

    Raises:
        TypeError: the processor has no fast tokenizer or takes no images with conversations.
        ValueError: the tokenizer has no padding token, or the format is unknown or unusable.
    """

    def __init__(
        self, processor: Any, *, format: str | None = None, max_length: int | None = None
    ) -> None:
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None:
            raise TypeError(
                f"processor is a {type(processor).__name__}, expected one with a tokenizer"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise TypeError(
                f"processor: its {type(tokenizer).__name__} does not say where tokens lie, "
                "expected a fast tokenizer"
            )
        if tokenizer.pad_token is None:
            raise ValueError("processor: its tokenizer has no pad_token, expected one")
        if (why := why_unsupported(processor)) is not None:
            raise TypeError(f"processor is a {type(processor).__name__}: {why}")
        template = chat_template(processor)
        format = format or ("chat" if template else "v1")
        if format not in FORMATS:
            raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
        if format == "chat" and not template:
            raise ValueError("format is 'chat', but the processor has no chat template")
        if format == "v1" and tokenizer.eos_token is None:
            raise ValueError("format is 'v1', but the tokenizer has no eos_token")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}, expected at least 1")
        self.processor, self.format, self.max_length = processor, format, max_length

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Make a batch, padded on the right.

        If an example from a dataset with ``on_bad="skip"`` is refused, the next example that is
        accepted takes its place.

        Args:
            examples: at least one.

        Returns:
            The processor's tensors, and ``labels`` ``(batch, tokens)`` int64, which is -100 except
                on answers. A batch without images has no ``pixel_values``.

        Raises:
            BadRecord: ``max_length`` cuts off part of an image or all answers of an example; its
                text contains the processor's own image token; or the processor or its template
                refuses it. The message names the record and the image and quotes the processor.
            Exception: from the processor, if it accepts each example alone but not the batch.
            ValueError: ``examples`` is empty.
        """
        if not examples:
            raise ValueError("examples is empty, expected at least one")
        return collate_or_replace(examples, self._batch)

    def _batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        formatted = [self._formatted(example) for example in examples]
        batch = call_processor(
            self.processor, [one.text for one in formatted], [one.image for one in examples],
            padding=True, padding_side="right", return_tensors="pt",
            **self._options(formatted[0].text),
        )  # fmt: skip
        ids, attended = batch["input_ids"], batch["attention_mask"]
        labels = torch.full_like(ids, IGNORED)
        for row, (example, one) in enumerate(zip(examples, formatted, strict=True)):
            count = int(attended[row].sum())
            learned = self._learned(example, one, ids[row, :count].tolist())
            labels[row, learned] = ids[row, learned]
            if marks_answers_by_type(self.processor):
                batch["token_type_ids"][row, learned[0] : count] = 1
        longest = self.max_length
        if longest is not None and ids.shape[1] > longest:
            batch = {k: v[:, :longest] if k in BY_TOKEN else v for k, v in batch.items()}
            labels = labels[:, :longest]
        return {**batch, "labels": labels}

    def _formatted(self, example: Example) -> FormattedText:
        formatted = format_example(example, self.processor, self.format)
        if token := image_token(self.processor):
            count, expected = formatted.text.count(token), int(example.image is not None)
            if count != expected:
                self._refuse("image count", example, f"{token} {expected} times in the text", count)
        return formatted

    def _options(self, text: str) -> dict[str, Any]:
        """Tokenizer options: templates and processors may add the beginning-of-sequence token."""
        begin = self.processor.tokenizer.bos_token
        brought = begin is not None and text.startswith(begin)
        if brought or writes_bos_before_image(self.processor):
            return {"add_special_tokens": False}
        return {}

    def _learned(self, example: Example, formatted: FormattedText, ids: list[int]) -> list[int]:
        """Positions of a row's tokens that belong to answers, up to ``max_length``."""
        text = formatted.text
        options = {**tokenizer_options(self.processor), **self._options(text)}
        own = self.processor.tokenizer(text, return_offsets_mapping=True, **options)
        before, after = self._around(example, text, own["offset_mapping"])
        # The number of tokens that the processor adds when it expands the image.
        grown = len(ids) - len(own["input_ids"])
        if (
            (grown != 0 if example.image is None else grown + after < before)
            or ids[:before] != own["input_ids"][:before]
            or ids[after + grown :] != own["input_ids"][after:]
        ):
            raise TypeError(
                f"processor: {type(self.processor).__name__} makes other tokens of the text than "
                f"its tokenizer does, beside those of the image: {describe(text)}"
            )
        learned = [
            place if place < before else place + grown
            for place, (start, end) in enumerate(own["offset_mapping"])
            if any(_belongs(start, end, *answer, text) for answer in formatted.answers)
        ]
        if not learned:
            raise ValueError(
                f"processor: the {self.format} format has no answer in {describe(text)}"
            )
        if self.max_length is None or len(ids) <= self.max_length:
            return learned
        kept = [place for place in learned if place < self.max_length]
        if example.image is not None and after + grown > self.max_length:
            wanted = f"an image that ends within {self.max_length} tokens"
            self._refuse("too long", example, wanted, after + grown)
        if not kept:
            wanted = f"an answer that begins within {self.max_length} tokens"
            self._refuse("too long", example, wanted, learned[0])
        return kept

    def _around(
        self, example: Example, text: str, places: list[tuple[int, int]]
    ) -> tuple[int, int]:
        """Position of the image's first token and the token after it; (0, 0) without an image."""
        token = image_token(self.processor)
        if not token or example.image is None:
            return 0, 0
        begin = text.index(token)
        inside = [
            number
            for number, (start, end) in enumerate(places)
            if begin <= start < end <= begin + len(token)
        ]
        return inside[0], inside[-1] + 1

    def _refuse(self, kind: str, example: Example, wanted: str, actual: int) -> NoReturn:
        raise BadRecord(
            RecordIssue(kind, example.index, example.id, "conversations", wanted, str(actual))
        )


def _belongs(start: int, end: int, first: int, last: int, text: str) -> bool:
    """Whether the token at characters start..end is learned with the answer at first..last."""
    if start >= first and end <= last and (start < end or first < start < last):
        return True
    return bool(text[max(start, first) : min(end, last)].strip())
