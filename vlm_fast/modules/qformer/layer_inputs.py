"""The inputs of a Q-Former's layer besides the hidden states."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

KeysValues = tuple[Tensor, Tensor]


@dataclass
class LayerInputs:
    """The inputs of a layer besides the hidden states; most are the same for all layers.

    Attributes:
        query_length: the number of queries; they are the first tokens.
        projected: whether the image input consists of keys and values, not of features.
        image_mask: bool ``(batch, keys)``, true where a feature is seen, or None.
        image_bias: an additive mask of the image instead, broadcast to
            ``(batch, 1, queries, keys)``, or None.
        bias: additive mask of the self-attention, broadcast to
            ``(batch, 1, tokens, tokens + past)``, or None.
        key_mask: bool ``(batch, tokens + past)``, true where a token is seen, or None.
        keep: whether a layer returns the keys and values of its self-attention too.
        seeds: int64, one for each dropout of a layer; None if no dropout is active.
        plain: whether ops may read the parameters directly; otherwise the children are called.
    """

    query_length: int
    projected: bool = False
    image_mask: Tensor | None = None
    image_bias: Tensor | None = None
    bias: Tensor | None = None
    key_mask: Tensor | None = None
    keep: bool = False
    seeds: Tensor | None = None
    plain: bool = True

    def for_layer(self, projected: bool, seeds: Tensor | None, plain: bool) -> LayerInputs:
        """The inputs of one layer: a new object, because checkpointing reads it again."""
        return LayerInputs(
            self.query_length, projected, self.image_mask, self.image_bias, self.bias,
            self.key_mask, self.keep, seeds, plain,
        )  # fmt: skip

    def seed(self, i: int) -> Tensor | None:
        return None if self.seeds is None else self.seeds[i]
