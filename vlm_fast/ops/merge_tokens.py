"""Tokens that are alike become their mean, and can be spread out again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_fast.kernels import merge_tokens as kernels
from vlm_fast.kernels.bipartite_match import match_of_pairs
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_type, wrong_value
from vlm_fast.ops.declaration import FLOATS, Cost, nbytes, op

PARTS = ("destination", "order", "start")


@op
def merge_tokens(
    x: Tensor, match: Sequence[Tensor], size: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each merged token is the mean of its tokens, weighted by how many each of them stands for.

    Token Merging, arXiv 2210.09461, section 3. Sums are taken in fp32 and in a fixed order, a B
    token first; a token that is alone comes through unchanged.

    Args:
        x: ``(batch, tokens, features)``; rows at any pitch are not copied.
        match: of ``batch`` and ``tokens``, by `bipartite_match`.
        size: ``(batch, tokens)`` of x's dtype or fp32, positive: what each token stands for, as an
            earlier merge returned it. None is 1 for each.

    dtypes other than fp32, fp16 and bf16 fall back. Gradients go to x and to size.

    Returns the merged tokens ``(batch, merged, features)`` in x's dtype, and their sizes
    ``(batch, merged)`` in that of size, fp32 without. The sum of sizes is kept; exactly, where
    they are whole numbers below 2^24.

    Raises:
        TypeError: an argument is no tensor, x not floating, size or match of another dtype.
        ValueError: shapes do not fit, or devices differ.
        IndexError: the match has a number out of range; on CUDA its row is left out instead.
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


@merge_tokens.accepts
def accepts(x, match, size):
    name = "merge_tokens"
    match = _checked(name, "x", x, match)
    if x.shape[:2] != match[0].shape:
        raise wrong_value(name, "x", x, f"{(*match[0].shape, x.shape[2])} to match destination")
    if size is not None:
        if not isinstance(size, Tensor):
            raise not_a_tensor(name, "size", size)
        if size.shape != x.shape[:2]:
            raise wrong_value(name, "size", size, f"{tuple(x.shape[:2])}, one for each token")
        if size.dtype not in (x.dtype, torch.float32):
            raise wrong_type(name, "size", size, f"{x.dtype} as x has, or torch.float32")
        if size.device != x.device:
            raise wrong_value(name, "size", size, f"{x.device}, where x is")
    return x, match, size


@merge_tokens.requires
def requires(x, match, size):
    return _why_not(x)


@merge_tokens.forward
def forward(needs, x, match, size):
    destination, order, start = match
    wide = None if size is None else size.float().contiguous()
    out, total = kernels.sum_tokens(x, order, start, wide, mean=True)
    assert total is not None
    result = total if size is None else total.to(size.dtype)
    if not (needs.x or needs.size):
        return (out, result), ()
    of_size = (x, order, start) if needs.size else (None, None, None)
    return (out, result), (destination, size, total, *of_size)


@merge_tokens.backward
def backward(needs, kept, dout, dtotal):
    destination, size, total, x, order, start = kept
    wide = None if size is None else size.float().contiguous()
    dx = kernels.spread_tokens(dout, destination, wide, total) if needs.x else None
    dsize = None
    if needs.size:
        # mean' = (x - mean) / total: the inner product with the mean is the mean of inner products.
        products = kernels.row_products(x, dout, destination)
        mean, _ = kernels.sum_tokens(products.unsqueeze(2), order, start, wide, mean=True)
        to = destination.long()
        dsize = (products - mean.squeeze(2).gather(1, to)) / total.gather(1, to)
        dsize = (dsize + dtotal.float().gather(1, to)).to(size.dtype)
    return dx, None, dsize


@merge_tokens.constants
def constants(needs):
    return () if needs.size else (1,)  # counts, or sums of what has no gradient


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
    test=[
        dict(batch=1, tokens=1, features=1, r=0),
        dict(batch=3, tokens=7, features=17, r=3, sized=True),
        dict(batch=1, tokens=5, features=1152, r=2),
        dict(batch=2, tokens=8, features=100, r=4, sized=True),
    ],
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


@op
def unmerge_tokens(merged: Tensor, match: Sequence[Tensor]) -> Tensor:
    """Each token becomes a copy of the merged token that it went into.

    What Token Merging does for dense prediction (arXiv 2303.17604, section 3.2). Its gradient is
    the sum over the tokens of a merged token, in fp32 and in a fixed order.

    Args:
        merged: ``(batch, merged, features)``.
        match: by `bipartite_match`, for so many merged tokens.

    dtypes other than fp32, fp16 and bf16 fall back. Returns ``(batch, tokens, features)``.

    Raises:
        TypeError, ValueError, IndexError: as `merge_tokens`.
    """
    rows = match[0].long().unsqueeze(2).expand(-1, -1, merged.shape[2])
    return merged.gather(1, rows)


@unmerge_tokens.accepts
def accepts_unmerge(merged, match):
    name = "unmerge_tokens"
    match = _checked(name, "merged", merged, match)
    expected = (match[0].shape[0], match[2].shape[1] - 1)
    if merged.shape[:2] != expected:
        raise wrong_value(name, "merged", merged, f"{(*expected, merged.shape[2])} to match start")
    return merged, match


@unmerge_tokens.requires
def requires_unmerge(merged, match):
    return _why_not(merged)


@unmerge_tokens.forward
def forward_unmerge(needs, merged, match):
    destination, order, start = match
    kept = (order, start) if needs.merged else (None, None)
    return kernels.spread_tokens(merged, destination), kept


@unmerge_tokens.backward
def backward_unmerge(needs, kept, dout):
    return kernels.sum_tokens(dout, *kept, mean=False)[0], None


@unmerge_tokens.cost
def cost_unmerge(merged, match):
    rows = match[0].numel() * merged.shape[2] * merged.element_size()
    moved = nbytes(merged, match[0]) + rows
    return Cost(0, moved, rows // merged.element_size(), moved + nbytes(match[2]))


@unmerge_tokens.inputs(
    test=[
        dict(batch=1, tokens=1, features=1, r=0),
        dict(batch=3, tokens=7, features=17, r=3),
        dict(batch=1, tokens=8, features=100, r=4),
    ],
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


def _checked(name, argument, x, match):
    """The match as a list, once x and the match fit themselves."""
    if not isinstance(x, Tensor):
        raise not_a_tensor(name, argument, x)
    if x.ndim != 3:
        raise wrong_value(name, argument, x, f"(batch, {argument} tokens, features)")
    if not x.is_floating_point():
        raise wrong_type(name, argument, x, "a floating dtype (float32, bfloat16 or float16)")
    if not isinstance(match, (list, tuple)) or len(match) != len(PARTS):
        got = f"a {type(match).__name__} of {len(match)}" if hasattr(match, "__len__") else match
        raise TypeError(
            f"vlm_fast.{name}: match is {got}, expected the three tensors of bipartite_match"
        )
    for part, value in zip(PARTS, match, strict=True):
        label = f"match ({part})"
        if not isinstance(value, Tensor):
            raise not_a_tensor(name, label, value)
        if value.ndim != 2:
            raise wrong_value(name, label, value, "two dimensions, the first of them batch")
        if value.dtype != torch.int32:
            raise wrong_type(name, label, value, "torch.int32")
        if value.device != x.device:
            raise wrong_value(name, label, value, f"{x.device}, where {argument} is")
    destination, order, start = match
    if order.shape != destination.shape:
        wanted = f"{tuple(destination.shape)} as destination has"
        raise wrong_value(name, "match (order)", order, wanted)
    batch, tokens = destination.shape
    if start.shape[0] != batch or not 1 <= start.shape[1] <= tokens + 1:
        wanted = f"({batch}, merged + 1) of at most {tokens} merged tokens"
        raise wrong_value(name, "match (start)", start, wanted)
    return list(match)


def _why_not(x):
    if x.dtype not in FLOATS:
        return f"{x.dtype} has no kernels here (float32, bfloat16 and float16 have)"
    return None
