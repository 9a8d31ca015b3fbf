"""Which media each token sees, as patched models hand it to their layers: sets, not masks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlm_fast.fallback import DISABLED
from vlm_fast.ops.media_cross_attention import MAX_LISTED
from vlm_fast.patching.class_swap import PatchedModule


class MediaMask(NamedTuple):
    """A set of media for each token.

    Layers are given a plain tuple of the two: tools that cast, move or export what a module is
    given make its containers anew, each from one list of what it holds.

    Attributes:
        bits: int64 ``(batch, tokens)``, bit m standing for medium m.
        media: how many there are.
    """

    bits: Tensor
    media: int

    @classmethod
    def from_bool(cls, seen: Tensor, rows: Sequence[int]) -> MediaMask:
        """Of bool ``(batch, tokens, media)``; one sample or one token stands for all ``rows``."""
        medium = torch.arange(seen.shape[2], device=seen.device)
        bits = (seen.long() << medium).sum(2)
        of_all = [n if given == 1 else given for n, given in zip(rows, bits.shape, strict=True)]
        return cls(bits.expand(of_all), seen.shape[2])

    @property
    def seen(self) -> Tensor:
        """Bool ``(batch, tokens, media)``."""
        medium = torch.arange(self.media, device=self.bits.device)
        return (self.bits.unsqueeze(2) >> medium) & 1 != 0

    def dense_mask(self, keys: int, dtype: torch.dtype) -> Tensor:
        """``(batch, 1, tokens, keys)``: 0 where a key is seen, else the least number of dtype.

        In float64 that of float32, in which eager attention takes its softmax.
        """
        hidden = ~self.seen.repeat_interleave(keys // self.media, 2).unsqueeze(1)
        least = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
        return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, least)


class ProvidesMediaMask(PatchedModule):
    """A model that computes nothing itself: it hands its layers the media each token sees."""

    handles_children = False


class ReadsMediaMask(PatchedModule):
    """A layer whose model gives it sets; its fallback makes the masks that its base takes."""

    def unpatched_copy(self) -> nn.Module:
        plain: Any = copy.deepcopy(self)
        plain.why_not = lambda: DISABLED
        return plain


def why_not_media_mask(mask: Any, dimensions: int) -> str | None:
    """Why a mask of tokens by media is not taken as sets, or None."""
    if not isinstance(mask, Tensor) or mask.ndim != dimensions:
        return "there is no mask of tokens by media"
    if mask[0, 0].numel() > MAX_LISTED:
        return f"{mask[0, 0].numel()} media are more than {MAX_LISTED}, the bits of a set"
    return None
