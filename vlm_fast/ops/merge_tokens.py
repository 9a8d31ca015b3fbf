"""Similar tokens merged into their weighted mean (Token Merging)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_fast.kernels import merge_tokens as kernels
from vlm_fast.kernels.bipartite_match import match_of_pairs
from vlm_fast.ops.declaration import Cost, nbytes, op


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
    """Merge each group of matched tokens into its mean, weighted by their sizes.

    Token Merging, arXiv 2210.09461, section 3. Sums are taken in fp32 and in a fixed order, a token
    of B first. A token that is the only one of its group is copied exactly. The sum of sizes does
    not change; it is exact for whole numbers below 2**24. Gradients go to x and to size. Dtypes
    other than fp32, fp16 and bf16 fall back.

    Args:
        x: Rows at any pitch are not copied.
        match: What `bipartite_match` returned.
        size: The positive number of original tokens in each token, as an earlier merge returned it.
            None means 1 for each.

    Returns:
        The merged tokens ``(batch, merged, features)`` in x's dtype, and their sizes ``(batch,
        merged)`` in the dtype of size, or fp32.

    Raises:
        IndexError: The match has a number out of range. On CUDA that row is skipped instead.
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
def forward(
    needs_grad: Any, x: Tensor, match: Sequence[Tensor], size: Tensor | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    destination, order, start = match
    wide = None if size is None else size.float().contiguous()
    out, total = kernels.sum_tokens(x, order, start, wide, mean=True)
    assert total is not None
    result = total if size is None else total.to(size.dtype)
    if not (needs_grad.x or needs_grad.size):
        return (out, result), ()
    for_size = (x, order, start) if needs_grad.size else (None, None, None)
    return (out, result), (destination, size, total, *for_size)


@merge_tokens.backward
def backward(
    needs_grad: Any, saved_tensors: Any, dout: Tensor, dtotal: Tensor
) -> tuple[Tensor | None, None, Tensor | None]:
    destination, size, total, x, order, start = saved_tensors
    wide = None if size is None else size.float().contiguous()
    dx = kernels.spread_tokens(dout, destination, wide, total) if needs_grad.x else None
    dsize = None
    if needs_grad.size:
        # The derivative of the mean is (x - mean) / total. The inner product of dout with the mean
        # is the mean of the inner products, so the mean itself is not needed.
        products = kernels.row_products(x, dout, destination)
        mean, _ = kernels.sum_tokens(products.unsqueeze(2), order, start, wide, mean=True)
        to = destination.long()
        dsize = (products - mean.squeeze(2).gather(1, to)) / total.gather(1, to)
        dsize = (dsize + dtotal.float().gather(1, to)).to(size.dtype)
    return dx, None, dsize


@merge_tokens.non_differentiable
def non_differentiable(needs_grad: Any) -> tuple[int, ...]:
    # The second result is a sum of sizes.
    return () if needs_grad.size else (1,)


@merge_tokens.cost
def cost(x: Tensor, match: Sequence[Tensor], size: Tensor | None) -> Cost:
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
def inputs(
    batch: int, tokens: int, features: int, r: int, *, sized: bool = False
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    x = torch.randn(batch, tokens, features)
    size = None
    if sized:
        size = torch.arange(batch * tokens, dtype=torch.float32).remainder(5).add(1)
        size = size.view(batch, tokens)
    return x, sample_match(batch, tokens, r), size


def sample_match(batch: int, tokens: int, r: int) -> list[Tensor]:
    """A match for tests that merges ``r`` pairs of pseudo-random tokens."""
    half_a, half_b = (tokens + 1) // 2, tokens // 2
    number = torch.arange(batch * half_a, dtype=torch.int64).view(batch, half_a)
    closeness = (number * 7919 % 1009).to(torch.float32)
    partner = number * 104729 // 11 % max(half_b, 1)
    return list(match_of_pairs(closeness, partner, r, tokens))
