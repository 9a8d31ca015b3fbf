"""The mask between text tokens and media (images), decoded from one integer index per token.

ATTEND says what the index means. "latest": the number of media before the token, which attends to
the last of them. "all_previous": the same number, and the token attends to all of them. "listed":
bit m is set if the token attends to medium m. UNATTENDED says what a token does that has no medium:
its result is "zero", the "uniform" mean over all media, or attention to "everything".
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton

SCANNED = tl.constexpr(2048)  # tokens of a sample at once, so that their latencies overlap
WINDOW = tl.constexpr(512)  # tokens of a program's share at once


@triton.jit
def load_index(index_ptr, query, inside, ATTEND: tl.constexpr):
    """Load the indices of a tile of tokens; return which of them have no medium, too."""
    index = tl.load(index_ptr + query, mask=inside, other=0)
    if ATTEND != "listed":
        index = tl.minimum(tl.maximum(index, 0), 2147483647).to(tl.int32)
    return index, (index == 0) & inside


@triton.jit
def _bit_or(a, b):
    return a | b


@triton.jit
def visible_range(
    index_ptr, query, inside, media, ATTEND: tl.constexpr, UNATTENDED: tl.constexpr
):  # fmt: skip
    """Indices of a tile of rows, which rows have no medium, and the media to visit.

    These are the numbers in ``[low, high)`` whose bit in ``union`` is set. With "latest" and
    "all_previous" every bit is set.
    """
    index, unattended_rows = load_index(index_ptr, query, inside, ATTEND)
    low, high = media * 0, media
    union = tl.cast(-1, tl.int64)
    if ATTEND == "listed":
        union = tl.reduce(index, 0, _bit_or)
        low, high = media, media * 0
        for medium in range(media):
            there = (union >> tl.cast(medium, tl.int64)) & 1 != 0
            low, high = (
                tl.where(there & (low > medium), medium, low),
                tl.where(there, medium + 1, high),
            )
    else:
        some = (index > 0) & inside
        last = tl.minimum(index, media)
        high = tl.max(tl.where(some, last, 0), axis=0)
        if ATTEND == "latest":
            low = tl.min(tl.where(some, last - 1, media), axis=0)
            low = tl.minimum(low, high)
    if UNATTENDED != "zero":
        anyone = tl.max(unattended_rows.to(tl.int32), axis=0) > 0
        low, high = tl.where(anyone, 0, low), tl.where(anyone, media, high)
        union = tl.where(anyone, -1, union)
    return index, unattended_rows, low, high, union


@triton.jit
def number_of_media(union, low, high):
    """The number of media in ``[low, high)`` whose bit in ``union`` is set."""
    found = low * 0
    for medium in range(low, high):
        found += ((union >> tl.cast(medium, tl.int64)) & 1).to(tl.int32)
    return found


@triton.jit
def is_visible(
    index, unattended_rows, inside, medium, ATTEND: tl.constexpr, UNATTENDED: tl.constexpr
):  # fmt: skip
    """Which rows attend to a medium."""
    if ATTEND == "latest":
        seen = index == medium + 1
    elif ATTEND == "all_previous":
        seen = index > medium
    else:
        seen = (index >> tl.cast(medium, tl.int64)) & 1 != 0
    if UNATTENDED != "zero":
        seen = seen | unattended_rows
    return seen & inside


@triton.jit
def tokens_of_medium(
    index_ptr, medium, queries, ATTEND: tl.constexpr, UNATTENDED: tl.constexpr
):  # fmt: skip
    """The first token of a sample that attends to a medium, the last plus 1, and their number."""
    first = tl.full([SCANNED], 2147483647, tl.int32)
    last = tl.zeros([SCANNED], tl.int32)
    count = tl.zeros([SCANNED], tl.int32)
    for start in range(0, queries, SCANNED):
        query = start + tl.arange(0, SCANNED)
        inside = query < queries
        index, unattended_rows = load_index(index_ptr, query, inside, ATTEND)
        seen = is_visible(index, unattended_rows, inside, medium, ATTEND, UNATTENDED)
        first = tl.where(seen, tl.minimum(first, query), first)
        last = tl.where(seen, query + 1, last)
        count += seen.to(tl.int32)
    first = tl.minimum(tl.min(first, axis=0), queries)
    return first, tl.max(last, axis=0), tl.sum(count, axis=0)


@triton.jit
def run_of_medium(index_ptr, medium, begin, end):
    """The next tokens from ``begin`` to ``end`` that see a medium and follow each other.

    They are the first of them and the last plus 1; with "latest".
    """
    first, stop, start = end, end, begin
    while start < end:
        query = start + tl.arange(0, WINDOW)
        index, _ = load_index(index_ptr, query, query < end, "latest")
        seen = (index == medium + 1) & (query < end)
        first = tl.minimum(first, tl.min(tl.where(seen, query, end), axis=0))
        after = (query > first) & (query < end) & (seen == 0)
        stop = tl.min(tl.where(after, query, end), axis=0)
        start = tl.where(stop < end, end, start + WINDOW)
    return first, stop


@triton.jit
def zero_where_equal(q, unattended_rows, UNATTENDED: tl.constexpr):
    """Rows q ``[rows, d]`` with zeros where all weights are to be equal: so are the scores then."""
    return tl.where(unattended_rows[:, None], 0.0, q) if UNATTENDED == "uniform" else q


@triton.jit
def tiles_of(low, high, per_medium):
    """The first tile of medium ``low`` and of medium ``high``, if all tiles are numbered."""
    first, last = low.to(tl.int64) * per_medium, high.to(tl.int64) * per_medium
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit
def first_of_tile(tile, SIZE: tl.constexpr):
    """The first token of a tile. The product is taken in int64; a token's number fits in int32."""
    return (tl.cast(tile, tl.int64) * SIZE).to(tl.int32)


def media_seen(media_index: Tensor, media: int, attend: str) -> Tensor:
    """Plain PyTorch: the mask as bool ``(batch, queries, media)``."""
    medium = torch.arange(media, device=media_index.device)
    index = media_index.unsqueeze(-1)
    if attend == "latest":
        return index == medium + 1
    if attend == "all_previous":
        return index > medium
    return (index >> medium) & 1 != 0
