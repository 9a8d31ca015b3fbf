"""The most similar token B of each token A, for `bipartite_match`; one program per tile of A."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._launcher import Config, kernel, precision, runs_triton
from ._native import native
from ._sizes import cdiv
from ._triton import tl, triton

TILE = 2**17  # similarities in a tile on a CPU; they fit in the second-level cache


class Halves(NamedTuple):
    """The number of tokens in A and in B, and how many of each are protected (the first ones)."""

    a: int
    b: int
    protected_a: int
    protected_b: int


def halves(tokens: int, protected: int) -> Halves:
    """Split so many tokens into A and B; the first ``protected`` tokens are never merged."""
    return Halves((tokens + 1) // 2, tokens // 2, (protected + 1) // 2, protected // 2)


# The first config is for so few tokens that each of its programs has a multiprocessor. With the
# second one two programs fit on a multiprocessor of an H200. Wider tiles would read A from the
# second-level cache less often, but then only one fits.
@kernel(
    Config({"BLOCK_A": 16, "BLOCK_B": 128, "BLOCK_K": 64}, num_warps=8),
    Config({"BLOCK_A": 128, "BLOCK_B": 64, "BLOCK_K": 64}, num_warps=8),
    choose=int,
)
@triton.jit(do_not_specialize=["count_a", "count_b", "first_a", "first_b"])
def nearest_kernel(
    metric_ptr, metric_batch, metric_token,  # (batch, tokens, features), inner stride 1
    best_ptr, nearest_ptr,  # (batch, count_a), fp32 and int32
    count_a, count_b, first_a, first_b,  # numbers of unprotected tokens, and the first of them
    features, PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # fp32 products run on scalar units, and their registers spill with more features at a time.
    WIDE: tl.constexpr = metric_ptr.dtype.element_ty == tl.float32
    COLS: tl.constexpr = 16 if WIDE else BLOCK_K
    TALL: tl.constexpr = BLOCK_A >= 64
    # A thread adds the squares of the 8 neighbours that it loads at once, to save registers.
    GROUP: tl.constexpr = 8 if TALL and not WIDE else 1
    blocks = tl.cdiv(count_a, BLOCK_A)
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    rows = tl.cdiv(count_a, blocks)  # the same number in each program, so that all read alike
    row = tl.arange(0, BLOCK_A)
    a = ((program % blocks) * rows).to(tl.int32) + row
    inside_a = (row < rows) & (a < count_a)
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
        squares = tl.zeros([BLOCK_B, COLS // GROUP], tl.float32)
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
            # y is read twice, by the product and for its squares. Triton 3.6 then has no buffer to
            # spare: it would copy the next y into this one while the tensor cores still read it. A
            # use of the scores makes each product end first; this one costs no instruction.
            scores = scores.to(tl.int32, bitcast=True).to(tl.float32, bitcast=True)
            squares += _squares(y.to(tl.float32), GROUP)
        # The length of an a does not change which b is nearest, so it is divided by at the end.
        scores *= _inverse_length(tl.sum(squares, axis=1))[None, :]
        valid = inside_b[None, :] & (scores == scores)  # NaN counts as -Inf
        scores = tl.where(valid, scores, float("-inf"))
        # The maximum and then its first place take a third of an arg-max's instructions.
        found = tl.max(scores, axis=1)
        place = tl.where(scores == found[:, None], b[None, :], start + BLOCK_B)
        nearest = tl.where(found > best, tl.min(place, axis=1), nearest)
        best = tl.maximum(best, found)
    COLS_A: tl.constexpr = COLS if TALL else 2 * COLS
    lane = tl.arange(0, COLS_A)
    squares_a = tl.zeros([BLOCK_A, COLS_A], tl.float32)
    for k in tl.range(0, features, COLS_A, num_stages=3):
        mask = inside_a[:, None] & (k + lane < features)[None, :]
        x = tl.load(at_a[:, None] + (k + lane)[None, :], mask=mask, other=0.0).to(tl.float32)
        squares_a += x * x
    best *= _inverse_length(tl.sum(squares_a, axis=1))
    valid = best == best
    offset = image * count_a + a
    tl.store(best_ptr + offset, tl.where(valid, best, float("-inf")), mask=inside_a)
    tl.store(nearest_ptr + offset, tl.where(valid, nearest, 0), mask=inside_a)


@triton.jit
def _squares(x, GROUP: tl.constexpr):
    """Sums of the squares of each GROUP neighbours in a row: ``(rows, columns / GROUP)``."""
    square = x * x
    if GROUP > 1:
        groups: tl.constexpr = square.shape[1] // GROUP
        square = tl.sum(tl.reshape(square, [square.shape[0], groups, GROUP]), axis=2)
    return square


@triton.jit
def _inverse_length(square):
    return tl.where(square > 0, 1.0 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)


def find_nearest(metric: Tensor, half: Halves, best: Tensor, nearest: Tensor) -> None:
    """Write each unprotected A's largest cosine similarity to a B, and the number of that B.

    metric: ``(batch, tokens, features)``; best: fp32, nearest: int32, ``(batch, unprotected A)``.
    The first of equal B is taken, and NaN counts as -Inf.
    """
    batch, _, features = metric.shape
    count_a, count_b = half.a - half.protected_a, half.b - half.protected_b
    if runs_triton(metric):
        nearest_kernel(
            lambda blocks: (batch * cdiv(count_a, blocks["BLOCK_A"]),),
            metric, *metric.stride()[:2], best, nearest, count_a, count_b,
            2 * half.protected_a, 2 * half.protected_b + 1, features, precision(metric.dtype),
            size=batch * count_a > 132 * 16,
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
    """`find_nearest` for a tile of inner products ``(A, B)``, given 1 / lengths."""
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
