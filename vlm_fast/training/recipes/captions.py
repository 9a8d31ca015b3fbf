"""Pictures with captions as BLIP-2's stages take them: the text alone, without image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vlm_fast.training.data import Caption
from vlm_fast.training.data.replacement_items import collate_or_replace

LENGTH = 32  # tokens of a caption; LAVIS' value in both stages


class CaptionCollator:
    """Makes a batch of ``Caption``: pixels, ids and mask.

    Args:
        processor: one of transformers with an image processor and a tokenizer.
        even: pad to ``length`` always, so that all ranks have as many tokens, as contrast wants.
        end: what follows each caption: LAVIS ends those of the second stage by a newline.
        length: the most tokens of a caption; the rest is cut off.
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
        """``pixel_values``, ``input_ids`` and ``attention_mask``.

        A caption from a data set with ``on_bad="skip"`` whose picture the processor refuses is
        replaced by the next that it takes.

        Raises:
            BadRecord: for another that it refuses, in the processor's words.
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
