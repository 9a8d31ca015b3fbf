"""Few-query attention from ATen's kernels, where Triton does not run.

The heads that share a key head are packed into the rows of one, so that no key is read twice and
its gradient comes out summed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dropout import keep_mask

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor | None, v2: Tensor | None,
    bias: Tensor | None, key_mask: Tensor | None, seed: Tensor | None,
    scale: float, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result ``(batch, heads, queries, d)`` and ``lse (batch, heads, queries)``."""
    queries = q.shape[2]
    if k2 is not None and v2 is not None:
        k, v = torch.cat([k, k2], 2), torch.cat([v, v2], 2)
    rows = _packed(q, k.shape[1])
    if dropout > 0 and seed is not None:
        s = _scores(rows, k, _packed_mask(bias, None, q, k), key_mask, scale)
        lse = s.logsumexp(-1)
        lse.masked_fill_(lse == -torch.inf, 0)  # no key to see: zeros
        p = s.sub_(lse[..., None]).exp_()
        p *= _survivors(p, queries, seed, dropout, 0)
        o = torch.matmul(p, v.float()).to(q.dtype)
    else:
        mask = _packed_mask(bias, key_mask, q, k)
        o, lse = _flash(rows, k, v, 0.0, False, attn_mask=mask, scale=scale)
        if key_mask is not None:
            # ATen adds the mask: NaN scores that nobody should see stay NaN.
            for image in _blind(key_mask):
                o[image], lse[image] = 0, 0
    return _unpacked(o, q), lse.reshape(q.shape[:3]).contiguous()


def backward(
    do: Tensor, o: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor | None, v2: Tensor | None,
    bias: Tensor | None, key_mask: Tensor | None, seed: Tensor | None,
    scale: float, dropout: float, want_q: bool, want_kv: bool, want_kv2: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of q, k, v, k2 and v2: source by source, as lse and o are of all keys."""
    dq, *found = [None] * 5
    if want_q or want_kv:
        dq, *found[:2] = _of_source(
            do, o, lse, q, k, v, bias, key_mask, seed, scale, dropout, 0
        )  # fmt: skip
    if k2 is not None and v2 is not None and k2.shape[2] > 0 and (want_q or want_kv2):
        more, *found[2:] = _of_source(
            do, o, lse, q, k2, v2, bias, key_mask, seed, scale, dropout, k.shape[2]
        )
        dq = more if dq is None else dq.add_(more)
    wanted = (want_kv, want_kv, want_kv2, want_kv2)
    others = (g if want else None for g, want in zip(found, wanted, strict=True))
    return dq if want_q else None, *others


def _of_source(
    do: Tensor, o: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_mask: Tensor | None,
    seed: Tensor | None, scale: float, dropout: float, first: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v through the keys of one source, whose first is number ``first``."""
    kv_heads, keys = k.shape[1:3]
    blind = [] if key_mask is None else _blind(key_mask)
    if bias is not None and bias.shape[3] != 1:
        bias = bias[..., first : first + keys]
    if key_mask is not None:
        key_mask = key_mask[:, first : first + keys]
    rows, drows, orows = (_packed(t, kv_heads) for t in (q, do, o))
    lse = lse.reshape(rows.shape[:3])
    if dropout > 0:
        mask = _packed_mask(bias, None, q, k)
        p, ds = _score_gradients(
            drows, orows, lse, rows, k, v, mask, key_mask, seed, scale, dropout, q.shape[2], first
        )
        p, ds = p.to(q.dtype), ds.mul_(scale).to(q.dtype)
        dq = torch.matmul(ds, k)
        dk = _by_tokens(torch.matmul(ds.transpose(2, 3), rows))
        dv = _by_tokens(torch.matmul(p.transpose(2, 3), drows))
    else:
        mask = _packed_mask(bias, key_mask, q, k)
        dq, dk, dv = _flash_backward(
            drows, rows, k, v, orows, lse, 0.0, False, attn_mask=mask, scale=scale
        )
        for image in blind:
            dq[image], dv[image] = 0, 0
    return _unpacked(dq, q), dk, dv


def bias_gradient(
    do: Tensor, o: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor | None, v2: Tensor | None,
    bias: Tensor, key_mask: Tensor | None, seed: Tensor | None,
    scale: float, dropout: float,
) -> Tensor:  # fmt: skip
    """The gradient of the bias, from scores that are there in full, as the bias is."""
    if k2 is not None and v2 is not None:
        k, v = torch.cat([k, k2], 2), torch.cat([v, v2], 2)
    kv_heads = k.shape[1]
    rows, drows, orows = (_packed(t, kv_heads) for t in (q, do, o))
    _, ds = _score_gradients(
        drows, orows, lse.reshape(rows.shape[:3]), rows, k, v, _packed_mask(bias, None, q, k),
        key_mask, seed, scale, dropout, q.shape[2], 0,
    )  # fmt: skip
    return ds.view(*q.shape[:3], k.shape[2]).sum_to_size(bias.shape).to(bias.dtype)


def _score_gradients(
    do: Tensor, o: Tensor, lse: Tensor, rows: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    key_mask: Tensor | None, seed: Tensor | None, scale: float, dropout: float,
    queries: int, first: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Probabilities after dropout, and the gradient of the scores, in fp32."""
    p = _scores(rows, k, mask, key_mask, scale).sub_(lse[..., None]).exp_()
    dp = torch.matmul(do.float(), v.float().transpose(2, 3))
    delta = (do.float() * o.float()).sum(-1, keepdim=True)
    if dropout > 0 and seed is not None:
        factor = _survivors(p, queries, seed, dropout, first)
        return p * factor, dp.mul_(factor).sub_(delta).mul_(p)
    return p, dp.sub_(delta).mul_(p)


def _scores(
    rows: Tensor, k: Tensor, mask: Tensor | None, key_mask: Tensor | None, scale: float
) -> Tensor:
    s = torch.matmul(rows.float(), k.float().transpose(2, 3)).mul_(scale)
    if mask is not None:
        s += mask
    return s if key_mask is None else s.masked_fill_(~key_mask[:, None, None], -torch.inf)


def _survivors(p: Tensor, queries: int, seed: Tensor, dropout: float, first: int) -> Tensor:
    """What dropout multiplies the probabilities ``(batch, kv_heads, rows, keys)`` by."""
    heads = p.shape[:3].numel() // queries
    key, query, head = (
        torch.arange(n, device=p.device) for n in (p.shape[3], queries, heads)
    )  # fmt: skip
    survives = keep_mask(seed, dropout, key + first, query[:, None], head[:, None, None])
    return survives.view(p.shape).to(p.dtype).div_(1 - dropout)


def _packed(x: Tensor, kv_heads: int) -> Tensor:
    """``(batch, heads, queries, d)`` as ``(batch, kv_heads, rows, d)``; all rows of a group."""
    if x.shape[1] == kv_heads:
        return x
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[3])


def _unpacked(x: Tensor, q: Tensor) -> Tensor:
    """The other way round, in memory ``(batch, queries, heads, d)``."""
    if x.shape == q.shape and x.transpose(1, 2).is_contiguous():
        return x
    batch, heads, queries, d = q.shape
    out = q.new_empty_strided(
        (batch, x.shape[1], heads // x.shape[1], queries, d),
        (queries * heads * d, heads // x.shape[1] * d, d, heads * d, 1),
    )
    return out.copy_(x.unflatten(2, (-1, queries))).view(q.shape)


def _by_tokens(x: Tensor) -> Tensor:
    """``(batch, heads, tokens, d)`` in memory ``(batch, tokens, heads, d)``."""
    return _unpacked(x, x)


def _packed_mask(
    bias: Tensor | None, key_mask: Tensor | None, q: Tensor, k: Tensor
) -> Tensor | None:
    """What is added to the packed scores, broadcastable to them."""
    if key_mask is not None:
        hidden = ~key_mask[:, None, None]
        zeros = q.new_zeros(hidden.shape) if bias is None else bias
        mask = zeros.masked_fill(hidden, -torch.inf)
    elif bias is not None:
        mask = bias if bias.shape[3] == k.shape[2] else bias.expand(-1, -1, -1, k.shape[2])
    else:
        return None
    if q.shape[1] == k.shape[1] or mask.shape[1] == mask.shape[2] == 1:
        return mask
    shape = (mask.shape[0], *q.shape[1:3], mask.shape[3])
    return _packed(mask.expand(shape), k.shape[1])


def _blind(key_mask: Tensor) -> list[int]:
    """The images of which no key is seen."""
    return (~key_mask.any(1)).nonzero().flatten().tolist()
