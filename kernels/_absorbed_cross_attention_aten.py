"""Absorbed attention from ATen's GEMMs, where Triton does not run."""

from __future__ import annotations

import torch
from torch import Tensor

from ._cross_attention_aten import softmax_gradient
from ._dropout import keep_mask


def after_dropout(p: Tensor, seed: Tensor | None, heads: int, dropout: float) -> Tensor:
    """The probabilities that weigh the values: p itself, or a copy with its dropout."""
    if dropout == 0 or seed is None:
        return p
    images, rows, keys = p.shape
    key, query, head = (
        torch.arange(n, device=p.device) for n in (keys, rows // heads, images * heads)
    )
    kept_here = keep_mask(seed, dropout, key, query.view(-1, 1), head.view(-1, 1, 1))
    return p * kept_here.view(p.shape).to(p.dtype).div_(1 - dropout)


def forward(
    q: Tensor, x: Tensor, weight_k: Tensor, weight_v: Tensor, bias_v: Tensor | None,
    key_mask: Tensor | None, seed: Tensor | None, scale: float, dropout: float,
    out: Tensor, p: Tensor,
) -> None:  # fmt: skip
    """Image by image, so that what is wide stays in cache and is there once."""
    images, queries, heads, _ = q.shape
    wide = q.new_empty(heads, queries, x.shape[2])
    rows = wide.view(heads * queries, -1)
    hidden = None if key_mask is None else ~key_mask
    for image in range(images):
        torch.baddbmm(
            wide, q[image].transpose(0, 1), weight_k, beta=0, alpha=scale, out=wide
        )  # fmt: skip
        torch.mm(rows, x[image].t(), out=p[image])
        if hidden is not None:
            p[image].masked_fill_(hidden[image], -torch.inf)
        p[image] = torch.ops.aten._safe_softmax(p[image], -1)
        if dropout == 0:
            torch.mm(p[image], x[image], out=rows)
            torch.bmm(wide, weight_v.transpose(1, 2), out=out[image].transpose(0, 1))
    if dropout > 0:
        dropped = after_dropout(p, seed, heads, dropout)
        for image in range(images):
            torch.mm(dropped[image], x[image], out=rows)
            torch.bmm(wide, weight_v.transpose(1, 2), out=out[image].transpose(0, 1))
    if bias_v is None:
        return
    total = (dropped if dropout > 0 else p).view(images, heads, queries, -1).sum(-1)
    out += total.transpose(1, 2)[..., None] * bias_v.view(heads, -1)


def backward(
    dout: Tensor, p: Tensor, q: Tensor, x: Tensor, weight_k: Tensor, weight_v: Tensor,
    bias_v: Tensor | None, seed: Tensor | None, scale: float, dropout: float,
    want_q: bool, want_x: bool, want_k: bool, want_v: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    images, queries, heads, _ = q.shape
    wide = q.new_empty(heads, queries, x.shape[2])
    rows = wide.view(heads * queries, -1)
    dp = torch.empty_like(p[0])
    dq = torch.empty_like(q, memory_format=torch.contiguous_format) if want_q else None
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if want_x else None
    weight = (heads, q.shape[3], x.shape[2])
    dweight_k = q.new_zeros(weight, dtype=torch.float32) if want_k else None
    dweight_v = q.new_zeros(weight, dtype=torch.float32) if want_v else None
    factor = dropped = None
    if dropout > 0:
        factor = after_dropout(torch.ones_like(p), seed, heads, dropout)
        dropped = p * factor
    for image in range(images):
        seen = (p if dropped is None else dropped)[image]
        dout_here = dout[image].transpose(0, 1)
        if want_q or want_x or want_k:
            torch.bmm(dout_here, weight_v, out=wide)
            torch.mm(rows, x[image].t(), out=dp)
            if dx is not None:
                torch.mm(seen.t(), rows, out=dx[image])
            if factor is not None:
                if bias_v is not None:
                    dp += (dout[image] * bias_v.view(heads, -1)).sum(-1).t().reshape(-1, 1)
                dp *= factor[image]
            ds = softmax_gradient(dp, p[image])
            if want_q or want_k:
                torch.mm(ds, x[image], out=rows)
            if dweight_k is not None:
                _accumulate(dweight_k, q[image].permute(1, 2, 0), wide, scale)
            if dq is not None:
                to = dq[image].transpose(0, 1)
                torch.baddbmm(to, wide, weight_k.transpose(1, 2), beta=0, alpha=scale, out=to)
            if dx is not None:
                torch.baddbmm(
                    wide, q[image].transpose(0, 1), weight_k, beta=0, alpha=scale, out=wide
                )
                dx[image].addmm_(ds.t(), rows)
        if dweight_v is not None:
            torch.mm(seen, x[image], out=rows)
            _accumulate(dweight_v, dout_here.transpose(1, 2), wide, 1.0)
    return (
        dq,
        dx,
        None if dweight_k is None else dweight_k.to(q.dtype),
        None if dweight_v is None else dweight_v.to(q.dtype),
    )


def _accumulate(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    if a.dtype == total.dtype:
        total.baddbmm_(a, b, alpha=scale)
    else:  # over many images, a sum in bf16 would lose what each adds
        total.add_(torch.bmm(a, b), alpha=scale)
