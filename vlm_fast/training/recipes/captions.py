"""Collator for images with captions, as BLIP-2's stages take them: text without image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vlm_fast.training.data import Caption
from vlm_fast.training.data.replacement_items import collate_or_replace

LENGTH = 32  # tokens of a caption; LAVIS uses it in both stages


class CaptionCollator:
    """Turns a list of ``Caption`` into a batch of pixels, token ids and attention mask.

    Args:
        processor: of transformers, with an image processor and a tokenizer.
        pad_to_length: always pad to ``length``, so that all ranks have the same number of tokens,
            which the contrastive loss needs.
        suffix: added to each caption; LAVIS adds a newline in the second stage.
        length: maximal tokens of a caption; the rest is cut off.

    Raises:
        TypeError: the processor has no image processor or no tokenizer.
    """

    def __init__(
        self, processor: Any, *, pad_to_length: bool = False, suffix: str = "", length: int = LENGTH
    ) -> None:
        for part in ("image_processor", "tokenizer"):
            if getattr(processor, part, None) is None:
                raise TypeError(
                    f"processor is a {type(processor).__name__}, expected one with a {part}"
                )
        self.processor, self.pad_to_length = processor, pad_to_length
        self.suffix, self.length = suffix, length

    def __call__(self, captions: Sequence[Caption]) -> dict[str, Tensor]:
        """Make a batch.

        If the processor refuses a caption from a dataset with ``on_bad="skip"``, the next caption
        that it accepts takes its place.

        Returns:
            ``pixel_values`` ``(batch, 3, height, width)`` floating, ``input_ids`` and
                ``attention_mask`` ``(batch, tokens)`` int64.

        Raises:
            BadRecord: the processor refuses another caption; the message quotes the processor.
        """
        return collate_or_replace(captions, self._batch)

    def _batch(self, captions: Sequence[Caption]) -> dict[str, Tensor]:
        images = self.processor.image_processor(
            [caption.image for caption in captions], return_tensors="pt"
        )
        text = self.processor.tokenizer(
            [caption.text + self.suffix for caption in captions],
            padding="max_length" if self.pad_to_length else "longest", padding_side="right",
            truncation=True, max_length=self.length, return_tensors="pt",
        )  # fmt: skip
        names = ("input_ids", "attention_mask")
        return {"pixel_values": images["pixel_values"], **{name: text[name] for name in names}}
