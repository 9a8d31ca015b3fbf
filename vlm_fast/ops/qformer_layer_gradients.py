"""Which gradients the backward of a Q-Former's layer computes, block by block."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from vlm_fast.ops.mlp import mlp
from vlm_fast.ops.qformer_layer_parameters import CROSS, MLP, SELF, split


class MLPNeeds(NamedTuple):
    """Which gradients of an MLP's block are needed.

    Attributes:
        x: of its input.
        parameters: of its parameters, one by one.
        mlp: of the arguments of the MLP's op, of which the block is a part.
    """

    x: bool
    parameters: tuple[bool, ...]
    mlp: Any

    def any(self) -> bool:
        return self.x or True in self.parameters


class Needs(NamedTuple):
    """Which gradients are needed, of arguments and of what lies between the blocks.

    Attributes:
        first, cross: of the parameters of the attentions' blocks, one by one; ``cross`` is empty
            without an image.
        x: of the layer's input.
        bias: of the scores' bias.
        scores: of the queries, keys and values of the self-attention, or of its bias.
        after_self: of the result of the self-attention block.
        kv: of the keys and values of the image.
        cross_scores: of the queries, or the keys and values, of the cross-attention.
        after_cross: of the result of the cross-attention block.
        queries, text: of the blocks of the MLPs; those of a block that is absent are not read.
    """

    first: tuple[bool, ...]
    cross: tuple[bool, ...]
    x: bool
    bias: bool
    scores: bool
    after_self: bool
    kv: bool
    cross_scores: bool
    after_cross: bool
    queries: MLPNeeds
    text: MLPNeeds


@functools.lru_cache(maxsize=256)
def needs_of(needs_grad: Any, has_image: bool, has_queries: bool) -> Needs:
    """The `Needs` of a call with this ``needs_grad`` of the op."""
    wanted = needs_grad.parameters or (False,) * (SELF + CROSS + 2 * MLP)
    first, cross, queries, text = split(wanted, has_image, has_queries)
    x, bias, kv = needs_grad.hidden, needs_grad.bias, needs_grad.image_kv
    scores = x or bias or any(first[:6])
    after_self = scores or any(first)
    cross_scores = has_image and (after_self or kv or any(cross[:2]))
    after_cross = after_self or cross_scores or any(cross)
    return Needs(
        first, cross, x, bias, scores, after_self, kv, cross_scores, after_cross,
        _mlp_needs(after_cross, queries), _mlp_needs(after_self, text),
    )  # fmt: skip


def _mlp_needs(x: bool, parameters: tuple[bool, ...]) -> MLPNeeds:
    make: Any = mlp.NeedsGrad
    return MLPNeeds(x, parameters, make(x, *(parameters or (False,) * MLP)[:3], False))
