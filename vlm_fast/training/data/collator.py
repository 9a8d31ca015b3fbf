"""Examples as a model's inputs, with labels on the answers alone."""

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
# What has a place for each token of a row, in the results of transformers' processors.
BY_TOKEN = (
    "input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids",
    "image_attention_mask", "cross_attention_mask", "image_embeds_position_mask",
)  # fmt: skip


class Collator:
    """Makes a batch of ``Example``: the processor's inputs and ``labels``.

    The text is tokenised whole, once as the processor does and once for the places of its tokens.
    What stands before and after an image must come out the same both times, so that no label is off
    by a token. A token is learned if it lies within an answer, or if it has a character of one that
    is no space: one that a tokenizer merges from the end of the prompt and the beginning of the
    answer is.

    Args:
        processor: one of ``transformers``, with a fast tokenizer that has a padding token.
        format: ``"chat"``, the processor's chat template; ``"v1"`` or ``"plain"``, LLaVA's own of
            its two stages. By default the template if the processor has one, else ``"v1"``.
        max_length: of a row, images included; what exceeds it is cut off at the end.

    Raises:
        ValueError, TypeError: if the processor or the format is none of these.
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
        """The processor's tensors; ``labels`` is ``(batch, tokens)`` int64, -100 but on answers.

        Rows are padded on the right. Without an image in the batch there are no ``pixel_values``.

        An example that came from a data set with ``on_bad="skip"`` and is refused is replaced by
        the next that is not.

        Raises:
            BadRecord: for an example that ``max_length`` would leave without a part of its image,
                or without any of its answers; whose text has the processor's token of an image
                itself; or that the processor or its template refuses, also where the processor's
                tokens are not those of the text around its image: naming record and picture, in
                the processor's words.
            Exception: what the processor raises for examples each of which it takes alone.
            ValueError: without an example.
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
        """Templates and processors may bring the token of the beginning themselves."""
        begin = self.processor.tokenizer.bos_token
        brought = begin is not None and text.startswith(begin)
        if brought or writes_bos_before_image(self.processor):
            return {"add_special_tokens": False}
        return {}

    def _learned(self, example: Example, formatted: FormattedText, ids: list[int]) -> list[int]:
        """Which of a row's tokens belong to answers, within ``max_length``."""
        text = formatted.text
        options = {**tokenizer_options(self.processor), **self._options(text)}
        own = self.processor.tokenizer(text, return_offsets_mapping=True, **options)
        before, after = self._around(example, text, own["offset_mapping"])
        # By how much the image is longer than what stands for it in the text.
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
        """The token that stands for the image and the one after it; both 0 without one."""
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
    """Whether the token of these characters is learned with the answer of those."""
    if start >= first and end <= last and (start < end or first < start < last):
        return True
    return bool(text[max(start, first) : min(end, last)].strip())
