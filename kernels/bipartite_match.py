"""Bipartite soft matching of tokens (Token Merging, arXiv 2210.09461), in three kernels.

Tokens with an even number form set A, those with an odd number set B. `nearest_kernel` (see
`_nearest_tokens`) finds the most similar B of each A; `closest_pairs_kernel`, one program per tile
of A, marks the r closest pairs; and `merged_order_kernel`, one program per tile of token numbers
within A and B, computes the result, three int32 tensors:

- ``destination (batch, tokens)``: the merged token that each token becomes part of;
- ``order (batch, tokens)``: all tokens, grouped by merged token;
- ``start (batch, merged + 1)``: where in ``order`` the group of each merged token begins.

No more than a tile of similarities is in memory, and nothing is sorted: the position of a token is
the number of tokens that come before it, so the order of execution does not matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launcher import Config, dense, is_traced, kernel, runs_triton
from ._native import native
from ._nearest_tokens import find_nearest, halves
from ._sizes import cdiv
from ._triton import tl, triton


@kernel(Config({"BLOCK": 16, "OTHERS": 256}, num_warps=4))
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
    closer = tl.zeros([BLOCK, OTHERS], tl.int32)
    for start in range(0, count, OTHERS):
        o = start + tl.arange(0, OTHERS)
        # What lies outside is -Inf with a higher number than any pair, so it is never closer.
        other = tl.load(best_ptr + first + o, mask=o < count, other=float("-inf"))[None, :]
        lower = o[None, :] < a[:, None]
        closer += ((other > mine[:, None]) | ((other == mine[:, None]) & lower)).to(tl.int32)
    kept = tl.sum(closer, axis=1) < r
    tl.store(kept_ptr + first + a, kept.to(tl.uint8), mask=inside)


@kernel(Config({"BLOCK": 16, "OTHERS": 128}, num_warps=4))
@triton.jit(do_not_specialize=["tokens", "r", "count", "first_a", "first_b"])
def merged_order_kernel(
    kept_ptr, nearest_ptr,  # (batch, count)
    destination_ptr, order_ptr,  # (batch, tokens)
    start_ptr,  # (batch, tokens - r + 1)
    tokens, r, count, first_a, first_b,  # of unprotected tokens, counted within A and within B
    BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    half_a, half_b = (tokens + 1) // 2, tokens // 2
    blocks = tl.cdiv(half_b + 1, BLOCK)  # + 1 for the last entry of start
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    i = ((program % blocks) * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    pairs = image * count
    own = i - first_a
    paired = (own >= 0) & (own < count)
    merges = tl.load(kept_ptr + pairs + own, mask=paired, other=0) != 0
    partner = first_b + tl.load(nearest_ptr + pairs + own, mask=paired, other=0)
    none = tl.zeros([BLOCK, OTHERS], tl.int32)
    merged_before = none  # merging A before this A
    ahead_of_pair = none  # merging A whose B comes before this A's B
    earlier_in_group = none  # merging A before this A, into the same B
    merged_into_lower = none  # merging A whose B comes before this B
    for start in range(0, count, OTHERS):
        o = start + tl.arange(0, OTHERS)
        kept = tl.load(kept_ptr + pairs + o, mask=o < count, other=0) != 0
        target = first_b + tl.load(nearest_ptr + pairs + o, mask=o < count, other=0)
        # An A that does not merge comes after all and has a B after all.
        o, target = tl.where(kept, o, tokens)[None, :], tl.where(kept, target, tokens)[None, :]
        before = o < own[:, None]
        merged_before += before.to(tl.int32)
        earlier_in_group += (before & (target == partner[:, None])).to(tl.int32)
        ahead_of_pair += (target < partner[:, None]).to(tl.int32)
        merged_into_lower += (target < i[:, None]).to(tl.int32)
    merged_before, ahead_of_pair = tl.sum(merged_before, axis=1), tl.sum(ahead_of_pair, axis=1)
    earlier_in_group = tl.sum(earlier_in_group, axis=1)
    merged_into_lower = tl.sum(merged_into_lower, axis=1)
    remaining_a = half_a - r
    is_a, is_b = i < half_a, i < half_b
    to_a = tl.where(merges, remaining_a + partner, i - merged_before)
    position_a = tl.where(merges, to_a + ahead_of_pair + 1 + earlier_in_group, to_a)
    to_b = remaining_a + i
    position_b = to_b + merged_into_lower
    row, starts = image * tokens, image * (tokens - r + 1)
    tl.store(destination_ptr + row + 2 * i, to_a, mask=is_a)
    tl.store(order_ptr + row + position_a, 2 * i, mask=is_a)
    tl.store(start_ptr + starts + to_a, position_a, mask=is_a & (merges == 0))
    tl.store(destination_ptr + row + 2 * i + 1, to_b, mask=is_b)
    tl.store(order_ptr + row + position_b, 2 * i + 1, mask=is_b)
    tl.store(start_ptr + starts + to_b, position_b, mask=i <= half_b)


Match = tuple[Tensor, Tensor, Tensor]  # destination, order, start


def bipartite_match(metric: Tensor, r: int, protected: int) -> Match:
    """Return destination, order and start for r merged pairs; see the module's docstring.

    metric: ``(batch, tokens, features)``; r: at most half of the tokens that are not protected.
    """
    batch, tokens, _ = metric.shape
    half = halves(tokens, protected)
    numbers = [
        metric.new_empty(batch, n, dtype=torch.int32) for n in (tokens, tokens, tokens - r + 1)
    ]
    found = (numbers[0], numbers[1], numbers[2])
    if is_traced(metric) and not runs_triton(metric):
        return found
    count = half.a - half.protected_a if r else 0  # without merges nothing is compared
    best = metric.new_empty(batch, count, dtype=torch.float32)
    nearest = metric.new_empty(batch, count, dtype=torch.int32)
    if r:
        find_nearest(dense(metric), half, best, nearest)
    if runs_triton(metric):
        kept = metric.new_empty(batch, count, dtype=torch.uint8)
        if r:
            closest_pairs_kernel(
                lambda blocks: (batch * cdiv(count, blocks["BLOCK"]),),
                best, kept, count, r,
            )  # fmt: skip
        merged_order_kernel(
            lambda blocks: (batch * cdiv(half.b + 1, blocks["BLOCK"]),),
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


def match_of_pairs(best: Tensor, partner: Tensor, r: int, tokens: int) -> Match:
    """Plain PyTorch: destination, order and start that merge the r closest of ``count`` pairs.

    best ``(batch, count)``: the similarity of each of the last ``count`` tokens of A to its
    partner; partner ``(batch, count)``: the number of that token within B.
    """
    batch, count = best.shape
    half_a, half_b = (tokens + 1) // 2, tokens // 2
    closest = best.sort(dim=1, descending=True, stable=True).indices[:, :r] + (half_a - count)
    # Out of place, because vmap forbids writing its batched pairs into a new tensor.
    none = torch.zeros(batch, half_a, dtype=torch.bool, device=best.device)
    merges = none.scatter(1, closest, torch.ones_like(closest, dtype=torch.bool))
    partners = torch.nn.functional.pad(partner, (half_a - count, 0))
    remaining_a = half_a - r
    to_a = torch.where(merges, remaining_a + partners, (~merges).cumsum(1) - 1)
    to_b = (remaining_a + torch.arange(half_b, device=best.device)).expand(batch, -1)
    destination = _interleaved(to_a, to_b)
    joins = _interleaved(merges.long(), torch.zeros_like(to_b))
    order = (2 * destination + joins).argsort(
        dim=1, stable=True
    )  # a B comes before the A that merge into it
    size = torch.zeros(batch, tokens - r, dtype=torch.int64, device=best.device)
    size = size.scatter_add(1, destination, torch.ones_like(destination))
    start = torch.nn.functional.pad(size.cumsum(1), (1, 0))
    return destination.int(), order.int(), start.int()


def _interleaved(of_a: Tensor, of_b: Tensor) -> Tensor:
    """Values ``(batch, tokens)`` of all tokens, from those of A and of B."""
    tokens = of_a.shape[1] + of_b.shape[1]
    of_b = torch.nn.functional.pad(of_b, (0, of_a.shape[1] - of_b.shape[1]))
    return torch.stack((of_a, of_b), 2).flatten(1)[:, :tokens]
