"""Which gradients the backward of a Q-Former's layer computes, block by block."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from vlm_fast.ops.mlp import mlp
from vlm_fast.ops.qformer_layer_parameters import CROSS, MLP, SELF


class Needs(NamedTuple):
    """Which gradients are needed, of arguments and of what lies between the blocks.

    Attributes:
        first, cross, last: of the parameters of the three blocks, one by one; ``cross`` is empty
            without an image.
        x: of the layer's input.
        bias: of the scores' bias.
        scores: of the queries, keys and values of the self-attention, or of its bias.
        after_self: of the result of the self-attention block.
        kv: of the keys and values of the image.
        cross_scores: of the queries, or the keys and values, of the cross-attention.
        after_cross: of the result of the cross-attention block.
        mlp: of the arguments of the MLP's op, of which the block is a part.
    """

    first: tuple[bool, ...]
    cross: tuple[bool, ...]
    last: tuple[bool, ...]
    x: bool
    bias: bool
    scores: bool
    after_self: bool
    kv: bool
    cross_scores: bool
    after_cross: bool
    mlp: Any


@functools.lru_cache(maxsize=256)
def needs_of(needs_grad: Any, has_image: bool) -> Needs:
    """The `Needs` of a call with this ``needs_grad`` of the op."""
    count = SELF + MLP + (CROSS if has_image else 0)
    wanted = needs_grad.parameters or (False,) * count
    first, cross, last = wanted[:SELF], wanted[SELF:-MLP], wanted[-MLP:]
    x, bias, kv = needs_grad.hidden, needs_grad.bias, needs_grad.image_kv
    scores = x or bias or any(first[:6])
    after_self = scores or any(first)
    cross_scores = has_image and (after_self or kv or any(cross[:2]))
    after_cross = after_self or cross_scores or any(cross)
    make: Any = mlp.NeedsGrad
    of_mlp = make(after_cross, *last[:3], False)
    return Needs(
        first, cross, last, x, bias, scores, after_self, kv, cross_scores, after_cross, of_mlp
    )
