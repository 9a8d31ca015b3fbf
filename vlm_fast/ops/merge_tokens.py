"""Tokens that are alike become their mean, and can be spread out again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_fast.kernels import merge_tokens as kernels
from vlm_fast.kernels.bipartite_match import match_of_pairs
from vlm_fast.ops.declaration import Cost, nbytes, op

PARTS = ("destination", "order", "start")


@op(
    x="floating (batch, tokens, features)",
    match=dict(
        destination="int32 (batch, tokens)",
        order="int32 (batch, tokens)",
        start="int32 (batch, starts)",
    ),
    size="like x or float32 (batch, tokens) or None",
    where={
        "1 <= starts <= tokens + 1": "start: (batch, merged + 1) of at most {tokens} merged tokens"
    },
)
def merge_tokens(
    x: Tensor, match: Sequence[Tensor], size: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Average the tokens that a match groups: each merged token is their weighted mean.

    Token Merging, arXiv 2210.09461, section 3. Sums are taken in fp32 and in a fixed order, a token
    of B first; a token that is alone in its group passes unchanged. The sum of sizes is kept, and
    exactly so for whole numbers below 2**24. Dtypes other than fp32, fp16 and bf16 fall back.
    Gradients go to x and to size.

    Args:
        x: Rows at any pitch are not copied.
        match: What `bipartite_match` returned.
        size: How many tokens each token stands for, as an earlier merge returned it, positive. None
            means 1 for each.

    Returns:
        The merged tokens ``(batch, merged, features)`` in x's dtype, and their sizes ``(batch,
        merged)`` in the dtype of size, or fp32.

    Raises:
        IndexError: The match has a number out of range. On CUDA its row is left out instead.
    """
    destination, _, start = match
    batch, _, features = x.shape
    merged = start.shape[1] - 1
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    weight = wide.new_ones(destination.shape) if size is None else size.to(wide.dtype)
    to = destination.long()
    total = weight.new_zeros(batch, merged).scatter_add(1, to, weight)
    rows = to.unsqueeze(2).expand(-1, -1, features)
    sums = wide.new_zeros(batch, merged, features)
    sums = sums.scatter_add(1, rows, wide * weight.unsqueeze(2))
    mean = (sums / total.unsqueeze(2)).to(x.dtype)
    return mean, total.to(total.dtype if size is None else size.dtype)


@merge_tokens.forward
def forward(needs_grad, x, match, size):
    destination, order, start = match
    wide = None if size is None else size.float().contiguous()
    out, total = kernels.sum_tokens(x, order, start, wide, mean=True)
    assert total is not None
    result = total if size is None else total.to(size.dtype)
    if not (needs_grad.x or needs_grad.size):
        return (out, result), ()
    of_size = (x, order, start) if needs_grad.size else (None, None, None)
    return (out, result), (destination, size, total, *of_size)


@merge_tokens.backward
def backward(needs_grad, saved_tensors, dout, dtotal):
    destination, size, total, x, order, start = saved_tensors
    wide = None if size is None else size.float().contiguous()
    dx = kernels.spread_tokens(dout, destination, wide, total) if needs_grad.x else None
    dsize = None
    if needs_grad.size:
        # mean' = (x - mean) / total: the inner product with the mean is the mean of inner products.
        products = kernels.row_products(x, dout, destination)
        mean, _ = kernels.sum_tokens(products.unsqueeze(2), order, start, wide, mean=True)
        to = destination.long()
        dsize = (products - mean.squeeze(2).gather(1, to)) / total.gather(1, to)
        dsize = (dsize + dtotal.float().gather(1, to)).to(size.dtype)
    return dx, None, dsize


@merge_tokens.non_differentiable
def constants(needs_grad):
    return () if needs_grad.size else (1,)  # counts, or sums of what has no gradient


@merge_tokens.cost
def cost(x, match, size):
    merged = x.shape[0] * (match[2].shape[1] - 1) * x.shape[2] * x.element_size()
    moved = nbytes(x, match[0]) + merged
    return Cost(
        forward_flops=2 * x.numel(),
        forward_bytes=moved + nbytes(match[2], size, size),
        backward_flops=x.numel(),
        backward_bytes=moved + nbytes(size, size),
    )


@merge_tokens.inputs(
    smallest=dict(batch=1, tokens=1, features=1, r=0),
    usual=dict(batch=3, tokens=7, features=17, r=3, sized=True),
    others=[
        dict(batch=1, tokens=5, features=1152, r=2),
        dict(batch=2, tokens=8, features=100, r=4, sized=True),
    ],
    large=dict(batch=5, tokens=107_000, features=4096, r=53000, sized=True),
    bitwise=True,
    bench={
        "CLIP-L/336, 64 images, half": dict(batch=64, tokens=576, features=1024, r=288),
        "SigLIP, 32 images, half, sized": dict(
            batch=32, tokens=729, features=1152, r=364, sized=True
        ),
        "CLIP-L/336, 1 image": dict(batch=1, tokens=576, features=1024, r=288),
    },
)
def inputs(batch, tokens, features, r, *, sized=False):
    x = torch.randn(batch, tokens, features)
    size = None
    if sized:
        size = torch.arange(batch * tokens, dtype=torch.float32).remainder(5).add(1)
        size = size.view(batch, tokens)
    return x, _some_match(batch, tokens, r), size


@op(
    merged="floating (batch, merged_tokens, features)",
    match=dict(
        destination="int32 (batch, tokens)",
        order="int32 (batch, tokens)",
        start="int32 (batch, merged_tokens + 1)",
    ),
    where={"merged_tokens <= tokens": "merged: at most {tokens} merged tokens, as destination has"},
)
def unmerge_tokens(merged: Tensor, match: Sequence[Tensor]) -> Tensor:
    """Copy each merged token to all tokens of its group.

    Token Merging for dense prediction, arXiv 2303.17604, section 3.2. The gradient of a merged
    token is the sum over its group, in fp32 and in a fixed order. Dtypes other than fp32, fp16 and
    bf16 fall back.

    Args:
        match: What `bipartite_match` returned for this number of merged tokens.

    Returns:
        ``(batch, tokens, features)``.

    Raises:
        IndexError: The match has a number out of range. On CUDA its row is left out instead.
    """
    rows = match[0].long().unsqueeze(2).expand(-1, -1, merged.shape[2])
    return merged.gather(1, rows)


@unmerge_tokens.forward
def forward_unmerge(needs_grad, merged, match):
    destination, order, start = match
    saved_tensors = (order, start) if needs_grad.merged else (None, None)
    return kernels.spread_tokens(merged, destination), saved_tensors


@unmerge_tokens.backward
def backward_unmerge(needs_grad, saved_tensors, dout):
    return kernels.sum_tokens(dout, *saved_tensors, mean=False)[0], None


@unmerge_tokens.cost
def cost_unmerge(merged, match):
    rows = match[0].numel() * merged.shape[2] * merged.element_size()
    moved = nbytes(merged, match[0]) + rows
    return Cost(0, moved, rows // merged.element_size(), moved + nbytes(match[2]))


@unmerge_tokens.inputs(
    smallest=dict(batch=1, tokens=1, features=1, r=0),
    usual=dict(batch=3, tokens=7, features=17, r=3),
    others=[
        dict(batch=1, tokens=8, features=100, r=4),
    ],
    large=dict(batch=5, tokens=107_000, features=4096, r=53000),
    bitwise=True,
    bench={"CLIP-L/336, 64 images, half": dict(batch=64, tokens=576, features=1024, r=288)},
)
def inputs_unmerge(batch, tokens, features, r):
    return torch.randn(batch, tokens - r, features), _some_match(batch, tokens, r)


def _some_match(batch, tokens, r):
    """As of random tokens: r pairs of an A and a B anywhere."""
    half_a, half_b = (tokens + 1) // 2, tokens // 2
    number = torch.arange(batch * half_a, dtype=torch.int64).view(batch, half_a)
    closeness = (number * 7919 % 1009).to(torch.float32)
    partner = number * 104729 // 11 % max(half_b, 1)
    return list(match_of_pairs(closeness, partner, r, tokens))
