"""One connector at one number of visual tokens, with its costs: a row of the advice."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_fast.advisor.published_results import Measurement
from vlm_fast.ops.declaration import Cost


@dataclass(frozen=True)
class Option:
    """One connector at one number of tokens, for one request unless said otherwise.

    Attributes:
        connector, title: its name, and in prose; own: whether the model was published with it.
        visual_tokens: of an image, in the language model's sequence.
        seen_tokens: of an image, that the language model sees, in its sequence or beside it.
        patches: of an image, that the tower computes.
        compression: patches to a seen token.
        text_tokens_left: what the context leaves for text.
        parameters: of the connector.
        cost: of the connector's forward and backward: FLOPs and bytes.
        saved_bytes: what its backward keeps, by the ``saved`` level where there are levels.
        prefill_flops: of the language model for images and text; prefill_flops_of_images: the part
            that would not be there without the images; prefill_bytes: its weights, and the keys and
            values it writes.
        key_value_bytes: of images and text, while the request lasts.
        weight_bytes: of the whole model, once.
        memory_bytes: the weights, and keys and values of all requests.
        most_requests: how many fit into the memory; None where none was given.
        infeasible: why it cannot be had, or None.
        measured: what results files say of it.
        reasons_for, reasons_against: to be read.
    """

    connector: str
    title: str
    own: bool
    visual_tokens: int
    seen_tokens: int
    patches: int
    compression: float
    text_tokens_left: int
    parameters: int
    cost: Cost
    saved_bytes: dict[str, int]
    prefill_flops: int
    prefill_flops_of_images: int
    prefill_bytes: int
    key_value_bytes: int
    weight_bytes: int
    memory_bytes: int
    most_requests: int | None
    infeasible: str | None
    measured: tuple[Measurement, ...] = ()
    reasons_for: tuple[str, ...] = ()
    reasons_against: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        """Of connector and prefill, forward."""
        return self.cost.forward_flops + self.prefill_flops
