"""One connector at one number of visual tokens, with its costs: a row of the advice."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_fast.advisor.published_results import Measurement
from vlm_fast.ops.declaration import Cost


@dataclass(frozen=True)
class Option:
    """One connector at one number of visual tokens. Costs are per request unless stated otherwise.

    Attributes:
        connector: its name.
        title: its name in prose.
        published: whether the model was published with this connector.
        visual_tokens: tokens of an image in the language model's sequence.
        seen_tokens: tokens of an image that the language model sees, in its sequence or by
            cross-attention.
        patches: patches of an image that the vision encoder computes.
        compression: patches per seen token.
        text_tokens_left: tokens of the context that are left for text.
        parameters: of the connector.
        cost: FLOPs and bytes of the connector's forward and backward.
        saved_bytes: memory that the connector keeps for backward, by ``saved`` level if it has
            levels.
        prefill_flops: of the language model for images and text.
        prefill_flops_of_images: the part of them that images cause.
        prefill_bytes: weights of the language model, and keys and values that it writes.
        key_value_bytes: keys and values of images and text.
        weight_bytes: of the whole model.
        memory_bytes: weights, and keys and values of all requests.
        most_requests: how many requests fit into memory; None without a limit.
        infeasible: why the option is impossible, or None.
        measured: what results files say about it.
        reasons_for, reasons_against: sentences.
    """

    connector: str
    title: str
    published: bool
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
        """Forward FLOPs of the connector and the prefill."""
        return self.cost.forward_flops + self.prefill_flops
