"""Merged tokens copied back to all tokens of their groups (Token Merging)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_fast.kernels import merge_tokens as kernels
from vlm_fast.ops.declaration import Cost, nbytes, op
from vlm_fast.ops.merge_tokens import sample_match


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
        IndexError: The match has a number out of range. On CUDA that row is skipped instead.
    """
    rows = match[0].long().unsqueeze(2).expand(-1, -1, merged.shape[2])
    return merged.gather(1, rows)


@unmerge_tokens.forward
def forward(
    needs_grad: Any, merged: Tensor, match: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    destination, order, start = match
    saved_tensors = (order, start) if needs_grad.merged else (None, None)
    return kernels.spread_tokens(merged, destination), saved_tensors


@unmerge_tokens.backward
def backward(needs_grad: Any, saved_tensors: Any, dout: Tensor) -> tuple[Tensor, None]:
    return kernels.sum_tokens(dout, *saved_tensors, mean=False)[0], None


@unmerge_tokens.cost
def cost(merged: Tensor, match: Sequence[Tensor]) -> Cost:
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
def inputs(batch: int, tokens: int, features: int, r: int) -> tuple[Tensor, list[Tensor]]:
    return torch.randn(batch, tokens - r, features), sample_match(batch, tokens, r)
