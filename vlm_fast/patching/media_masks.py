"""Which images each text token attends to, as bits: passed from a patched model to its layers.

transformers makes a dense mask of text tokens by image tokens. A bitmask has one int64 per token.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlm_fast.fallback import DISABLED
from vlm_fast.ops.media_cross_attention import MAX_LISTED
from vlm_fast.patching.class_swap import swapped_class
from vlm_fast.patching.patched_module import PatchedModule


class MediaMask(NamedTuple):
    """The set of media (images or tiles) that each token attends to.

    Models pass it to layers as a plain tuple: tools that cast, move or export the arguments of a
    module rebuild its containers from a single list of their items.

    Attributes:
        bits: int64 ``(batch, tokens)``; bit m is set if the token attends to medium m.
        media: the number of media.
    """

    bits: Tensor
    media: int

    @classmethod
    def from_bool(cls, seen: Tensor, rows: Sequence[int]) -> MediaMask:
        """The mask of bool ``(batch, tokens, media)``; sizes of 1 are expanded to ``rows``.

        Args:
            seen: true where a token attends to a medium.
            rows: batch and number of tokens.
        """
        medium = torch.arange(seen.shape[2], device=seen.device)
        bits = (seen.long() << medium).sum(2)
        sizes = [n if given == 1 else given for n, given in zip(rows, bits.shape, strict=True)]
        return cls(bits.expand(sizes), seen.shape[2])

    @property
    def seen(self) -> Tensor:
        """Bool ``(batch, tokens, media)``, true where a token attends to a medium."""
        medium = torch.arange(self.media, device=self.bits.device)
        return (self.bits.unsqueeze(2) >> medium) & 1 != 0

    def dense_mask(self, keys: int, dtype: torch.dtype) -> Tensor:
        """The additive mask ``(batch, 1, tokens, keys)`` of transformers for eager attention.

        It is 0 where a token attends to a key, else the lowest number of ``dtype``; for float64 the
        lowest float32, because eager attention computes its softmax in float32.
        """
        hidden = ~self.seen.repeat_interleave(keys // self.media, 2).unsqueeze(1)
        lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
        return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, lowest)


class ProvidesMediaMask(PatchedModule):
    """Base of the mixins of models that only pass a `MediaMask` to their layers."""

    handles_children = False


class ReadsMediaMask(PatchedModule):
    """Base of the mixins of layers that get a `MediaMask` from their model.

    Their fallback makes from it the dense masks that the base class takes.
    """

    def unpatched_copy(self) -> nn.Module:
        """A copy that takes the same arguments and always falls back to its base class."""
        plain: Any = copy.deepcopy(self)
        base, mixin, settings = self.patch_spec
        plain.__class__ = swapped_class(base, _always_falling_back(mixin), settings)  # type: ignore[arg-type]
        return plain


@functools.cache
def _always_falling_back(mixin: Any) -> Any:
    """A subclass of a mixin whose ``why_not`` always gives a reason."""
    return type(mixin.__name__, (mixin,), {"why_not": lambda self: DISABLED})


def why_not_media_mask(mask: Any, dimensions: int) -> str | None:
    """Why a mask of text tokens by media cannot become a `MediaMask`, or None."""
    if not isinstance(mask, Tensor) or mask.ndim != dimensions:
        return "there is no mask of tokens by media"
    if mask[0, 0].numel() > MAX_LISTED:
        return f"{mask[0, 0].numel()} media are more than {MAX_LISTED}, the bits of a set"
    return None
