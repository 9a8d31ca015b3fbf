"""Bipartite soft matching of Token Merging (ToMe): pairs of similar tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.kernels import bipartite_match as kernels
from vlm_fast.ops.declaration import Cost, index_op, nbytes, no_kernel_for
from vlm_fast.ops.verdict import ULPS, Verdict

MAX_TOKENS = 2**30 - 1  # token numbers are int32; they are twice the numbers within A or B


@index_op(
    metric="floating (batch, tokens, features)",
    r="int from 0",
    protected="int from 0",
    where={"protected <= tokens": "protected: 0 to {tokens}, the tokens"},
)
def bipartite_match(metric: Tensor, *, r: int, protected: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Find pairs of similar tokens for `merge_tokens`: ToMe's bipartite soft matching.

    Token Merging, arXiv 2210.09461. Tokens with an even number form set A, those with an odd number
    set B. Each token of A is paired with the token of B that is nearest by the cosine of ``metric``
    (taken in fp32), and the ``r`` closest pairs merge. Among equal similarities the lower number
    comes first; a similarity that is NaN comes last. Nothing is differentiated, as in the paper.
    Dtypes other than fp32, fp16 and bf16 fall back.

    Args:
        metric: Features that are compared, such as the keys of attention or the tokens themselves.
        r: The number of tokens to merge away, reduced to ``(tokens - protected) // 2`` if above.
        protected: The number of first tokens (a CLS token, registers) that are not merged and that
            no token is merged into.

    Returns:
        Three int32 tensors, the match, for ``merged = tokens - r`` merged tokens. Merged tokens are
        ordered as in the paper: the tokens of A that remain, then all tokens of B.
        destination ``(batch, tokens)``: the merged token that each token becomes part of.
        order ``(batch, tokens)``: all tokens, grouped by merged token, the token of B first.
        start ``(batch, merged + 1)``: where in ``order`` each merged token's group begins.
    """
    batch, tokens, _ = metric.shape
    r = merged_away(tokens, r, protected)
    half = kernels.halves(tokens, protected)
    similarity = _similarity(metric, protected)
    if r == 0:
        best = partner = similarity.new_zeros(batch, 0)
    else:
        best, partner = similarity.masked_fill(similarity.isnan(), -torch.inf).max(2)
    return kernels.match_of_pairs(best, partner.long() + half.protected_b, r, tokens)


def merged_away(tokens: int, r: int, protected: int) -> int:
    """The number of tokens to merge: ``r``, or half of the unprotected tokens if that is less."""
    return min(r, (tokens - protected) // 2)


def _similarity(metric: Tensor, protected: int) -> Tensor:
    """Cosine similarities of all unprotected tokens of A with all those of B."""
    half = kernels.halves(metric.shape[1], protected)
    unit = F.normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=2)
    a, b = unit[:, 2 * half.protected_a :: 2], unit[:, 2 * half.protected_b + 1 :: 2]
    return a @ b.transpose(1, 2)


@bipartite_match.fallback_reason
def fallback_reason(metric: Tensor, *, r: int, protected: int) -> str | None:
    if metric.shape[1] > MAX_TOKENS:
        return f"more than {MAX_TOKENS} tokens"
    return no_kernel_for(metric)


@bipartite_match.forward
def forward(
    needs_grad: Any, metric: Tensor, *, r: int, protected: int
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[()]]:
    r = merged_away(metric.shape[1], r, protected)
    return kernels.bipartite_match(metric, r, protected), ()


@bipartite_match.verifier
def verifier(found: tuple[Tensor, ...], metric: Tensor, *, r: int, protected: int) -> list[Verdict]:
    """Verdicts on a match: its form, and how much similarity each choice loses against the best.

    Rounding decides between nearly equal similarities, so a choice may lose as much as rounding in
    plain PyTorch explains.
    """
    tokens = metric.shape[1]
    r = merged_away(tokens, r, protected)
    half = kernels.halves(tokens, protected)
    to_a = found[0][:, 2 * half.protected_a :: 2].long()
    merges = to_a >= half.a - r
    partner = torch.where(merges, to_a - (half.a - r), half.protected_b)
    expected = kernels.match_of_pairs(merges.float(), partner, r, tokens)
    partner = partner - half.protected_b
    well_formed = all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    if not well_formed or (partner < 0).any():
        return [Verdict("match", 0.0, 0.0, "not r pairs of tokens that may merge, in their order")]
    if r == 0:
        return [Verdict("match", 0.0, 0.0, None)]
    exact, native = _similarity(metric.double(), protected), _similarity(metric, protected)
    finite = exact.isfinite() & native.isfinite()
    error = (native - exact)[finite].abs().max().item() if finite.any() else 0.0
    budget = max(4 * error, ULPS[torch.float32] * torch.finfo(torch.float32).eps)
    exact = exact.masked_fill(exact.isnan(), -2.0)  # less than any cosine
    best = exact.max(2).values
    lost = (best - exact.gather(2, partner.unsqueeze(2)).squeeze(2))[merges]
    worst_in = best.masked_fill(~merges, torch.inf).min(1).values
    best_out = best.masked_fill(merges, -torch.inf).max(1).values
    return [
        _lost_similarity("nearest", lost.max().item(), budget),
        _lost_similarity("closest pairs", (best_out - worst_in).max().item(), budget),
    ]


def _lost_similarity(what: str, lost: float, budget: float) -> Verdict:
    """The verdict on choices that lose ``lost`` of the best cosine where ``budget`` is allowed."""
    failure = None if lost <= budget else f"a cosine {lost:.3g} below the best was taken"
    return Verdict(what, max(lost, 0.0), budget, failure)


@bipartite_match.cost
def cost(metric: Tensor, *, r: int, protected: int) -> Cost:
    batch, tokens, features = metric.shape
    half = kernels.halves(tokens, protected)
    pairs = batch * (half.a - half.protected_a) * (half.b - half.protected_b)
    numbers = 4 * batch * (3 * tokens + 1)
    return Cost(2 * pairs * features, nbytes(metric) + numbers, 0, 0)


@bipartite_match.inputs(
    smallest=dict(batch=1, tokens=1, features=1, r=0),
    usual=dict(batch=3, tokens=17, features=24, r=5, protected=1),
    others=[
        dict(batch=1, tokens=134, features=40, r=60),
        dict(batch=1, tokens=9, features=5, r=100, protected=2),
    ],
    large=dict(batch=5, tokens=107_000, features=4096, r=53000),
    bench={
        "CLIP-L/336, 64 images, half": dict(batch=64, tokens=576, features=1024, r=288),
        "CLIP-L/336, 128 images, keys of 64": dict(batch=128, tokens=576, features=64, r=288),
        "CLIP-L/336 with CLS, 1 image": dict(
            batch=1, tokens=577, features=1024, r=288, protected=1
        ),
    },
)
def inputs(batch: int, tokens: int, features: int) -> tuple[Tensor]:
    return (torch.randn(batch, tokens, features),)
