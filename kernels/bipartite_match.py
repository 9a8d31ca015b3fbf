"""Each token's nearest neighbour in the other half, the closest pairs, and who joins whom.

Tokens of even number are called A, those of odd number B (arXiv 2210.09461). What is found is told
in three tensors of numbers, int32:

- ``destination (batch, tokens)``: the merged token that a token becomes part of;
- ``order (batch, tokens)``: all tokens, those of the first merged token first;
- ``start (batch, merged + 1)``: where in ``order`` the tokens of each merged token begin.

Scores are never in memory beyond a tile, nothing is sorted, and no order of execution matters: the
place of a token is a count of the tokens that come before it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._launcher import Config, dense, is_traced, kernel, precision, runs_triton
from ._native import native
from ._triton import tl, triton

TILE = 2**17  # scores that a CPU holds at a time, in its second-level cache


class Halves(NamedTuple):
    """How many tokens A and B there are, and how many of each come first and are protected."""

    a: int
    b: int
    protected_a: int
    protected_b: int


def halves(tokens: int, protected: int) -> Halves:
    """A and B of so many tokens, of which the first ``protected`` take no part."""
    return Halves((tokens + 1) // 2, tokens // 2, (protected + 1) // 2, protected // 2)


@kernel(Config({"BLOCK_A": 64, "BLOCK_B": 64, "BLOCK_K": 32}, num_warps=8))
@triton.jit(do_not_specialize=["count_a", "count_b", "first_a", "first_b"])
def nearest_kernel(
    metric_ptr, metric_batch, metric_token,  # (batch, tokens, features), inner stride 1
    best_ptr, nearest_ptr,  # (batch, count_a), fp32 and int32
    count_a, count_b, first_a, first_b,  # unprotected, and the tokens these start at
    features, PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Products of fp32 take no tensor core but registers, and spill with more features at a time.
    COLS: tl.constexpr = 16 if metric_ptr.dtype.element_ty == tl.float32 else BLOCK_K
    blocks = tl.cdiv(count_a, BLOCK_A)
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    a = ((program % blocks) * BLOCK_A).to(tl.int32) + tl.arange(0, BLOCK_A)
    inside_a = a < count_a
    at_image = metric_ptr + image * metric_batch
    at_a = at_image + (first_a + 2 * a.to(tl.int64)) * metric_token
    lane = tl.arange(0, COLS)
    best = tl.full([BLOCK_A], float("-inf"), tl.float32)
    nearest = tl.zeros([BLOCK_A], tl.int32)
    for start in range(0, count_b, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        inside_b = b < count_b
        at_b = at_image + (first_b + 2 * b.to(tl.int64)) * metric_token
        scores = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
        squares = tl.zeros([BLOCK_B, COLS], tl.float32)
        for k in range(0, features, COLS):
            col = k + lane
            inside = col < features
            x = tl.load(
                at_a[:, None] + col[None, :], mask=inside_a[:, None] & inside[None, :], other=0.0
            )
            y = tl.load(
                at_b[:, None] + col[None, :], mask=inside_b[:, None] & inside[None, :], other=0.0
            )
            scores = tl.dot(x, tl.trans(y), scores, input_precision=PRECISION)
            wide = y.to(tl.float32)
            squares += wide * wide
        # The length of an a scales its scores alike: it counts only once the best is found.
        scores *= _inverse_length(tl.sum(squares, axis=1))[None, :]
        usual = inside_b[None, :] & (scores == scores)  # NaN is the lowest
        scores = tl.where(usual, scores, float("-inf"))
        found, place = tl.max(
            scores, axis=1, return_indices=True, return_indices_tie_break_left=True
        )
        nearest = tl.where(found > best, start + place, nearest)
        best = tl.maximum(best, found)
    squares_a = tl.zeros([BLOCK_A, COLS], tl.float32)
    for k in range(0, features, COLS):
        col = k + lane
        mask = inside_a[:, None] & (col < features)[None, :]
        x = tl.load(at_a[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
        squares_a += x * x
    best *= _inverse_length(tl.sum(squares_a, axis=1))
    usual = best == best
    offset = image * count_a + a
    tl.store(best_ptr + offset, tl.where(usual, best, float("-inf")), mask=inside_a)
    tl.store(nearest_ptr + offset, tl.where(usual, nearest, 0), mask=inside_a)


@triton.jit
def _inverse_length(square):
    return tl.where(square > 0, 1.0 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)


@kernel(Config({"BLOCK": 32, "OTHERS": 64}, num_warps=4))
@triton.jit(do_not_specialize=["count", "r"])
def closest_pairs_kernel(
    best_ptr, kept_ptr,  # (batch, count), fp32 and bytes
    count, r, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(count, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    first = (program // blocks) * count
    a = ((program % blocks) * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    inside = a < count
    mine = tl.load(best_ptr + first + a, mask=inside, other=0.0)
    closer = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, OTHERS):
        o = start + tl.arange(0, OTHERS)
        other = tl.load(best_ptr + first + o, mask=o < count, other=0.0)[None, :]
        lower = o[None, :] < a[:, None]
        before = (other > mine[:, None]) | ((other == mine[:, None]) & lower)
        closer += tl.sum((before & (o < count)[None, :]).to(tl.int32), axis=1)
    tl.store(kept_ptr + first + a, (closer < r).to(tl.uint8), mask=inside)


@kernel(Config({"BLOCK": 32, "OTHERS": 64}, num_warps=4))
@triton.jit(do_not_specialize=["tokens", "r", "count", "first_a", "first_b"])
def merged_order_kernel(
    kept_ptr, nearest_ptr,  # (batch, count)
    destination_ptr, order_ptr,  # (batch, tokens)
    start_ptr,  # (batch, tokens - r + 1)
    tokens, r, count, first_a, first_b,  # numbers among A and B, here
    BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    half_a, half_b = (tokens + 1) // 2, tokens // 2
    blocks = tl.cdiv(half_b + 1, BLOCK)  # one more: where the last one ends
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    i = ((program % blocks) * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    pairs = image * count
    own = i - first_a
    paired = (own >= 0) & (own < count)
    merges = tl.load(kept_ptr + pairs + own, mask=paired, other=0) != 0
    partner = first_b + tl.load(nearest_ptr + pairs + own, mask=paired, other=0)
    gone = tl.zeros([BLOCK], tl.int32)  # of A before, those that merge
    sooner = tl.zeros([BLOCK], tl.int32)  # that merge into lower B than this A does
    beside = tl.zeros([BLOCK], tl.int32)  # of A before, that merge into the same B
    joined = tl.zeros([BLOCK], tl.int32)  # that merge into lower B than this B
    for start in range(0, count, OTHERS):
        o = start + tl.arange(0, OTHERS)
        kept = (tl.load(kept_ptr + pairs + o, mask=o < count, other=0) != 0)[None, :]
        target = first_b + tl.load(nearest_ptr + pairs + o, mask=o < count, other=0)[None, :]
        before = kept & (o[None, :] < own[:, None])
        gone += tl.sum(before.to(tl.int32), axis=1)
        beside += tl.sum((before & (target == partner[:, None])).to(tl.int32), axis=1)
        sooner += tl.sum((kept & (target < partner[:, None])).to(tl.int32), axis=1)
        joined += tl.sum((kept & (target < i[:, None])).to(tl.int32), axis=1)
    left = half_a - r
    is_a, is_b = i < half_a, i < half_b
    to_a = tl.where(merges, left + partner, i - gone)
    place_a = tl.where(merges, to_a + sooner + 1 + beside, to_a)
    to_b = left + i
    place_b = to_b + joined
    row, starts = image * tokens, image * (tokens - r + 1)
    tl.store(destination_ptr + row + 2 * i, to_a, mask=is_a)
    tl.store(order_ptr + row + place_a, 2 * i, mask=is_a)
    tl.store(start_ptr + starts + to_a, place_a, mask=is_a & (merges == 0))
    tl.store(destination_ptr + row + 2 * i + 1, to_b, mask=is_b)
    tl.store(order_ptr + row + place_b, 2 * i + 1, mask=is_b)
    tl.store(start_ptr + starts + to_b, place_b, mask=i <= half_b)


Match = tuple[Tensor, Tensor, Tensor]  # destination, order, start


def bipartite_match(metric: Tensor, r: int, protected: int) -> Match:
    """``destination``, ``order`` and ``start`` of r merged pairs.

    metric: ``(batch, tokens, features)``; r at most half of the tokens that are not protected.
    """
    batch, tokens, _ = metric.shape
    half = halves(tokens, protected)
    numbers = [
        metric.new_empty(batch, n, dtype=torch.int32) for n in (tokens, tokens, tokens - r + 1)
    ]
    found = (numbers[0], numbers[1], numbers[2])
    if is_traced(metric) and not runs_triton(metric):
        return found
    count = half.a - half.protected_a if r else 0  # nobody needs to be compared
    best = metric.new_empty(batch, count, dtype=torch.float32)
    nearest = metric.new_empty(batch, count, dtype=torch.int32)
    if r:
        find_nearest(dense(metric), half, best, nearest)
    if runs_triton(metric):
        kept = metric.new_empty(batch, count, dtype=torch.uint8)
        if r:
            closest_pairs_kernel(
                lambda blocks: (batch * triton.cdiv(count, blocks["BLOCK"]),),
                best, kept, count, r,
            )  # fmt: skip
        merged_order_kernel(
            lambda blocks: (batch * triton.cdiv(half.b + 1, blocks["BLOCK"]),),
            kept, nearest, *found, tokens, r, count, half.protected_a, half.protected_b,
        )  # fmt: skip
        return found
    if native is not None and metric.is_cpu:
        native.merged_order(
            best.data_ptr(), nearest.data_ptr(), batch, count, tokens, r,
            half.protected_a, half.protected_b, *(t.data_ptr() for t in found),
            torch.get_num_threads(),
        )  # fmt: skip
        return found
    return match_of_pairs(best, nearest.long() + half.protected_b, r, tokens)


def find_nearest(metric: Tensor, half: Halves, best: Tensor, nearest: Tensor) -> None:
    """Of each unprotected A its largest cosine similarity to a B, and the number of that B.

    The lowest of equals; NaN is taken for -Inf.
    """
    batch, _, features = metric.shape
    count_a, count_b = half.a - half.protected_a, half.b - half.protected_b
    if runs_triton(metric):
        nearest_kernel(
            lambda blocks: (batch * triton.cdiv(count_a, blocks["BLOCK_A"]),),
            metric, *metric.stride()[:2], best, nearest, count_a, count_b,
            2 * half.protected_a, 2 * half.protected_b + 1, features, precision(),
        )  # fmt: skip
        return
    rows = max(TILE // count_b, 1)
    tile = torch.empty(min(rows, count_a), count_b, device=metric.device)
    for image in range(batch):
        wide = metric[image].float()
        inverse = torch.linalg.vector_norm(wide, dim=1).reciprocal_()
        inverse.masked_fill_(inverse == math.inf, 0)
        a, b = slice(2 * half.protected_a, None, 2), slice(2 * half.protected_b + 1, None, 2)
        inverse_a, inverse_b = inverse[a].contiguous(), inverse[b].contiguous()
        for first in range(0, count_a, rows):
            part = slice(first, first + rows)
            scores = tile[: count_a - first]
            torch.mm(wide[a][part], wide[b].t(), out=scores)
            _nearest_of_tile(
                scores, inverse_a[part], inverse_b, best[image, part], nearest[image, part]
            )


def _nearest_of_tile(
    scores: Tensor, inverse_a: Tensor, inverse_b: Tensor, best: Tensor, nearest: Tensor
) -> None:
    if native is not None and scores.is_cpu:
        native.nearest(
            scores.data_ptr(), *scores.shape, inverse_a.data_ptr(), inverse_b.data_ptr(),
            best.data_ptr(), nearest.data_ptr(),
        )  # fmt: skip
        return
    scores.mul_(inverse_b).masked_fill_(scores.isnan(), -math.inf)
    found = scores.max(1)
    value = found.values * inverse_a
    best.copy_(value.masked_fill(value.isnan(), -math.inf))
    nearest.copy_(found.indices.masked_fill(value.isnan(), 0))


def match_of_pairs(best: Tensor, partner: Tensor, r: int, tokens: int) -> Match:
    """Plain PyTorch: the match that merges the last ``count`` A of the best ``(batch, count)``.

    best: how close they are; partner: the number among B each would join.
    """
    batch, count = best.shape
    half_a, half_b = (tokens + 1) // 2, tokens // 2
    closest = best.sort(dim=1, descending=True, stable=True).indices[:, :r] + (half_a - count)
    # Nothing is written in place: under vmap the pairs have a dimension that a new tensor has not.
    none = torch.zeros(batch, half_a, dtype=torch.bool, device=best.device)
    merges = none.scatter(1, closest, torch.ones_like(closest, dtype=torch.bool))
    partners = torch.nn.functional.pad(partner, (half_a - count, 0))
    left = half_a - r
    to_a = torch.where(merges, left + partners, (~merges).cumsum(1) - 1)
    to_b = (left + torch.arange(half_b, device=best.device)).expand(batch, -1)
    destination = _interleaved(to_a, to_b)
    joins = _interleaved(merges.long(), torch.zeros_like(to_b))
    order = (2 * destination + joins).argsort(dim=1, stable=True)  # a B before those that join it
    size = torch.zeros(batch, tokens - r, dtype=torch.int64, device=best.device)
    size = size.scatter_add(1, destination, torch.ones_like(destination))
    start = torch.nn.functional.pad(size.cumsum(1), (1, 0))
    return destination.int(), order.int(), start.int()


def _interleaved(of_a: Tensor, of_b: Tensor) -> Tensor:
    """What belongs to the tokens, in their order: of A and B in turn, an A first and maybe last."""
    tokens = of_a.shape[1] + of_b.shape[1]
    of_b = torch.nn.functional.pad(of_b, (0, of_a.shape[1] - of_b.shape[1]))
    return torch.stack((of_a, of_b), 2).flatten(1)[:, :tokens]
