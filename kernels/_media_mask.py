"""Which media a token of text sees, from one number a token.

``latest``: the number of media so far, of which the last is seen; ``all_previous``: the same
number, and all of them are seen; ``listed``: bit m says whether medium m is. A token without any
is *alone*; it sees nothing ("zero"), everything with equal weight ("uniform"), or everything as its
scores are ("everything").
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton


@triton.jit
def load_index(index_ptr, query, inside, ATTEND: tl.constexpr):
    """The indices of some tokens, and which are alone."""
    index = tl.load(index_ptr + query, mask=inside, other=0)
    if ATTEND != "listed":
        index = tl.minimum(tl.maximum(index, 0), 2147483647).to(tl.int32)
    return index, (index == 0) & inside


@triton.jit
def sight(
    index_ptr, query, inside, media, ATTEND: tl.constexpr, UNATTENDED: tl.constexpr
):  # fmt: skip
    """Of a tile of rows: their indices, the alone, and the range of media that any of them sees."""
    index, alone = load_index(index_ptr, query, inside, ATTEND)
    if ATTEND == "listed":
        low, high = media * 0, media
    else:
        some = (index > 0) & inside
        last = tl.minimum(index, media)
        high = tl.max(tl.where(some, last, 0), axis=0)
        low = media * 0
        if ATTEND == "latest":
            low = tl.min(tl.where(some, last - 1, media), axis=0)
            low = tl.minimum(low, high)
    if UNATTENDED != "zero":
        anyone = tl.max(alone.to(tl.int32), axis=0) > 0
        low, high = tl.where(anyone, 0, low), tl.where(anyone, media, high)
    return index, alone, low, high


@triton.jit
def medium_is_seen(
    index, alone, inside, medium, ATTEND: tl.constexpr, UNATTENDED: tl.constexpr
):  # fmt: skip
    """Which rows see a medium."""
    if ATTEND == "latest":
        seen = index == medium + 1
    elif ATTEND == "all_previous":
        seen = index > medium
    else:
        seen = (index >> medium.to(tl.int64)) & 1 != 0
    if UNATTENDED != "zero":
        seen = seen | alone
    return seen & inside


@triton.jit
def tiles_of(low, high, per_medium):
    """Media ``low`` to ``high`` as tiles, numbered through."""
    first, last = low.to(tl.int64) * per_medium, high.to(tl.int64) * per_medium
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit
def first_of_tile(tile, SIZE: tl.constexpr):
    return (tile.to(tl.int64) * SIZE).to(tl.int32)  # numbers of tokens fit


def media_seen(media_index: Tensor, media: int, attend: str) -> Tensor:
    """Bool ``(batch, queries, media)``: the same on the host's side."""
    medium = torch.arange(media, device=media_index.device)
    index = media_index.unsqueeze(-1)
    if attend == "latest":
        return index == medium + 1
    if attend == "all_previous":
        return index > medium
    return (index >> medium) & 1 != 0
