"""Attention against raw features, the key and value projections absorbed into the queries.

With ``S = (q W_k) x^T`` and ``o = (P x) W_v^T`` no key and no value is formed. The products with x
are plain batched GEMMs over the images, and cuBLAS's. What those cannot do without a copy is here:
the products with one head's rows of a weight, whose other side lies (image, head, query) for the
GEMM next to it and (image, query, head) for the caller; and the softmax between the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _absorbed_cross_attention_aten as aten
from ._absorbed_cross_attention_aten import after_dropout
from ._dropout import kept, threshold
from ._launcher import Config, is_traced, kernel, precision, runs_triton
from ._triton import tl, triton


@kernel(
    Config({"BLOCK_ROWS": 64, "BLOCK_COLS": 64, "BLOCK_INNER": 64}, num_warps=4, num_stages=2),
    Config({"BLOCK_ROWS": 128, "BLOCK_COLS": 128, "BLOCK_INNER": 64}, num_warps=8, num_stages=3),
    Config({"BLOCK_ROWS": 64, "BLOCK_COLS": 128, "BLOCK_INNER": 64}, num_warps=8, num_stages=3),
)
@triton.jit(do_not_specialize=["rows", "queries"])
def head_product_kernel(
    a_ptr, a_image, a_query, a_head,  # (images, queries, heads, inner), inner at stride 1
    weight_ptr, weight_head, weight_inner, weight_col,
    bias_ptr, total_ptr,  # (heads * cols,) and (images, heads, queries) or None
    out_ptr, out_image, out_query, out_head,  # (images, queries, heads, cols)
    rows, queries, heads, inner, cols, scale,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    # Tiles of one head's columns are neighbours, so that its weight is read from L2.
    col_blocks = tl.cdiv(cols, BLOCK_COLS)
    program = tl.program_id(0)
    head = (program // col_blocks % heads).to(tl.int64)
    row = (program // col_blocks // heads).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = program % col_blocks * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside_rows, inside_cols = row < rows, col < cols
    image, query = row // queries, row % queries
    a_row = a_ptr + head * a_head + image * a_image + query * a_query
    weight = weight_ptr + head * weight_head + col[None, :].to(tl.int64) * weight_col
    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.float32)
    for start in range(0, inner, BLOCK_INNER):
        i = start + tl.arange(0, BLOCK_INNER)
        a = tl.load(
            a_row[:, None] + i[None, :], mask=inside_rows[:, None] & (i < inner)[None, :], other=0.0
        )
        w = tl.load(
            weight + i[:, None].to(tl.int64) * weight_inner,
            mask=(i < inner)[:, None] & inside_cols[None, :],
            other=0.0,
        )
        sums = tl.dot(a, w, sums, input_precision=PRECISION)
    sums *= scale
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + head * cols + col, mask=inside_cols, other=0.0).to(tl.float32)
        place = (image * heads + head) * queries + query
        total = tl.load(total_ptr + place, mask=inside_rows, other=0.0)
        sums += total[:, None] * bias[None, :]
    out = out_ptr + head * out_head + image * out_image + query * out_query
    inside = inside_rows[:, None] & inside_cols[None, :]
    tl.store(out[:, None] + col[None, :], sums.to(out_ptr.dtype.element_ty), mask=inside)


@kernel(
    Config({"BLOCK_ROWS": 64, "BLOCK_COLS": 64, "BLOCK_INNER": 32}, num_warps=8, num_stages=3),
    Config({"BLOCK_ROWS": 64, "BLOCK_COLS": 128, "BLOCK_INNER": 64}, num_warps=8, num_stages=3),
)
@triton.jit(do_not_specialize=["tokens", "queries"])
def head_weight_gradient_kernel(
    a_ptr, a_image, a_query, a_head,  # (images, queries, heads, rows)
    b_ptr, b_image, b_query, b_head,  # (images, queries, heads, cols)
    out_ptr,  # (heads, rows, cols)
    tokens, queries, heads, rows, cols, scale,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    row_blocks, col_blocks = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(cols, BLOCK_COLS)
    program = tl.program_id(0)
    head = (program // col_blocks // row_blocks).to(tl.int64)
    row = program // col_blocks % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = program % col_blocks * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside_rows, inside_cols = row < rows, col < cols
    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.float32)
    for start in range(0, tokens, BLOCK_INNER):
        token = (start + tl.arange(0, BLOCK_INNER)).to(tl.int64)
        inside = token < tokens
        image, query = token // queries, token % queries
        a_at = a_ptr + head * a_head + image * a_image + query * a_query
        b_at = b_ptr + head * b_head + image * b_image + query * b_query
        a = tl.load(
            a_at[None, :] + row[:, None], mask=inside[None, :] & inside_rows[:, None], other=0.0
        )
        b = tl.load(
            b_at[:, None] + col[None, :], mask=inside[:, None] & inside_cols[None, :], other=0.0
        )
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    out = out_ptr + (head * rows + row[:, None]) * cols + col[None, :]
    inside = inside_rows[:, None] & inside_cols[None, :]
    tl.store(out, (sums * scale).to(out_ptr.dtype.element_ty), mask=inside)


@kernel(Config({}, num_warps=4), Config({}, num_warps=8))
@triton.jit(do_not_specialize=["queries"])
def score_softmax_kernel(
    scores_ptr,  # (images, heads, queries, keys), fp32 or the dtype of p
    mask_ptr, mask_image, mask_key,  # (images, keys) bytes or None
    seed_ptr, drop_below, survivor_scale,
    p_ptr,  # as scores: before dropout
    dropped_ptr,  # as scores, after dropout, or None
    total_ptr,  # (images, heads, queries) fp32: sums after dropout, or None
    heads, queries, keys,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    image = row // (heads * queries)
    key = tl.arange(0, BLOCK_KEYS)
    inside = key < keys
    seen = inside
    if mask_ptr is not None:
        at = mask_ptr + image * mask_image + key.to(tl.int64) * mask_key
        seen = tl.load(at, mask=inside, other=0) != 0
    s = tl.load(scores_ptr + row * keys + key, mask=inside, other=0.0).to(tl.float32)
    s = tl.where(seen, s, -float("inf"))
    largest = tl.max(s, axis=0)
    e = tl.exp(s - tl.where(largest == -float("inf"), 0.0, largest))
    total = tl.sum(e, axis=0)
    p = e / tl.where(total == 0.0, 1.0, total)  # no key to see: zeros
    tl.store(p_ptr + row * keys + key, p.to(p_ptr.dtype.element_ty), mask=inside)
    if dropped_ptr is not None:
        query = (row % queries).to(tl.int32)
        head = (row // queries).to(tl.int32)
        p *= kept(tl.load(seed_ptr), key, query, head, drop_below) * survivor_scale
        tl.store(dropped_ptr + row * keys + key, p.to(p_ptr.dtype.element_ty), mask=inside)
    if total_ptr is not None:
        tl.store(total_ptr + row, tl.sum(tl.where(inside, p, 0.0), axis=0))


@kernel(Config({}, num_warps=4), Config({}, num_warps=8))
@triton.jit(do_not_specialize=["queries"])
def score_softmax_backward_kernel(
    p_ptr,  # (images, heads, queries, keys)
    dp_ptr,  # as p, fp32 or the dtype of p
    dtotal_ptr,  # (images, heads, queries) fp32 or None
    seed_ptr, drop_below, survivor_scale,
    ds_ptr,  # as p
    queries, keys,
    DROPS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    key = tl.arange(0, BLOCK_KEYS)
    inside = key < keys
    p = tl.load(p_ptr + row * keys + key, mask=inside, other=0.0).to(tl.float32)
    dp = tl.load(dp_ptr + row * keys + key, mask=inside, other=0.0).to(tl.float32)
    if dtotal_ptr is not None:
        dp += tl.load(dtotal_ptr + row)
    if DROPS:
        query = (row % queries).to(tl.int32)
        head = (row // queries).to(tl.int32)
        dp *= kept(tl.load(seed_ptr), key, query, head, drop_below) * survivor_scale
    # dp at the largest probability cancels; taken off first, it leaves no rounding of its size.
    pivot = tl.max(tl.where(inside & (p == tl.max(p, axis=0)), dp, -float("inf")), axis=0)
    dp -= tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)
    ds = p * (dp - tl.sum(tl.where(inside, p * dp, 0.0), axis=0))
    tl.store(ds_ptr + row * keys + key, ds.to(ds_ptr.dtype.element_ty), mask=inside)


@kernel(Config({}, num_warps=4), Config({}, num_warps=8))
@triton.jit(do_not_specialize=["queries"])
def drop_probabilities_kernel(
    p_ptr,  # (images, heads, queries, keys)
    seed_ptr, drop_below, survivor_scale,
    dropped_ptr,  # as p
    queries, keys,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    key = tl.arange(0, BLOCK_KEYS)
    inside = key < keys
    p = tl.load(p_ptr + row * keys + key, mask=inside, other=0.0).to(tl.float32)
    query = (row % queries).to(tl.int32)
    head = (row // queries).to(tl.int32)
    p *= kept(tl.load(seed_ptr), key, query, head, drop_below) * survivor_scale
    tl.store(dropped_ptr + row * keys + key, p.to(p_ptr.dtype.element_ty), mask=inside)


def absorbed_attention(
    q: Tensor,
    x: Tensor,
    weight_k: Tensor,
    weight_v: Tensor,
    bias_v: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    *,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """The result ``(images, queries, heads, d)``, and the probabilities before dropout.

    q: ``(images, queries, heads, d)``, x: ``(images, keys, width)``, weights
    ``(heads, d, width)``; probabilities ``(images, heads * queries, keys)`` in the dtype of x.
    """
    images, queries, heads, d = q.shape
    keys, width = x.shape[1:]
    out = q.new_empty(images, queries, heads, d)
    p = q.new_empty(images, heads * queries, keys)
    if not runs_triton(q):
        if not is_traced(q):
            aten.forward(q, x, weight_k, weight_v, bias_v, key_mask, seed, scale, dropout, out, p)
        return out, p
    wide = q.new_empty(images, heads, queries, width)
    by_query, by_image = wide.transpose(1, 2), wide.view(images, heads * queries, width)
    head_product(q, weight_k, by_query, scale=scale)
    scores = _scores(by_image, x)
    dropped = torch.empty_like(p) if dropout > 0 else None
    total = None
    if bias_v is not None:  # a query that sees nothing gets none of it
        total = q.new_empty(images, heads, queries, dtype=torch.float32)
    score_softmax_kernel(
        keys, lambda blocks: (images * heads * queries,),
        scores, key_mask, *(key_mask.stride() if key_mask is not None else (0, 0)),
        seed, threshold(dropout), 1 / (1 - dropout), p, dropped, total,
        heads, queries, keys, triton.next_power_of_2(keys),
    )  # fmt: skip
    torch.bmm(p if dropped is None else dropped, x, out=by_image)
    head_product(by_query, weight_v.transpose(1, 2), out, bias=bias_v, total=total)
    return out, p


def absorbed_attention_backward(
    dout: Tensor,
    p: Tensor,
    q: Tensor,
    x: Tensor,
    weight_k: Any,
    weight_v: Any,  # None where no gradient needs it
    bias_v: Tensor | None,
    seed: Tensor | None,
    *,
    scale: float,
    dropout: float,
    want_q: bool,
    want_x: bool,
    want_k: bool,
    want_v: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, x and the two weights; arguments as in `absorbed_attention`."""
    images, queries, heads, d = q.shape
    keys, width = x.shape[1:]
    if not runs_triton(q):
        if is_traced(q):
            weight = (heads, d, width)
            wanted = zip(
                (want_q, want_x, want_k, want_v), (q.shape, x.shape, weight, weight), strict=True
            )
            return tuple(q.new_empty(shape) if want else None for want, shape in wanted)
        return aten.backward(
            dout, p, q, x, weight_k, weight_v, bias_v, seed, scale, dropout,
            want_q, want_x, want_k, want_v,
        )  # fmt: skip
    dq: Any
    dx: Any
    dq = dx = dweight_k = dweight_v = None
    dropped = value_weights(p, seed, heads, dropout) if want_x or want_v else p
    wide = q.new_empty(images, heads, queries, width)
    by_query, by_image = wide.transpose(1, 2), wide.view(images, heads * queries, width)
    if want_q or want_x or want_k:
        head_product(dout, weight_v, by_query)
        if want_x:
            dx = torch.bmm(dropped.transpose(1, 2), by_image)
        dp = _scores(by_image, x)
        dtotal = None
        if bias_v is not None and dropout > 0:
            dtotal = torch.einsum("bmhd,hd->bhm", dout.float(), bias_v.view(heads, d).float())
            dtotal = dtotal.clone(memory_format=torch.contiguous_format)
        ds = torch.empty_like(p)
        score_softmax_backward_kernel(
            keys, lambda blocks: (images * heads * queries,),
            p, dp, dtotal, seed, threshold(dropout), 1 / (1 - dropout), ds,
            queries, keys, dropout > 0, triton.next_power_of_2(keys),
        )  # fmt: skip
        del dp
        if want_q or want_k:
            torch.bmm(ds, x, out=by_image)
            if want_q:
                dq = q.new_empty(images, queries, heads, d)
                head_product(by_query, weight_k.transpose(1, 2), dq, scale=scale)
            if want_k:
                dweight_k = head_weight_gradient(q, by_query, scale=scale)
        if want_x:
            head_product(q, weight_k, by_query, scale=scale)
            dx.baddbmm_(ds.transpose(1, 2), by_image)
    if want_v:
        torch.bmm(dropped, x, out=by_image)
        dweight_v = head_weight_gradient(dout, by_query)
    return dq, dx, dweight_k, dweight_v


def value_weights(p: Tensor, seed: Tensor | None, heads: int, dropout: float) -> Tensor:
    """The probabilities that weigh the values: p itself, or a copy with its dropout.

    p: ``(images, heads * queries, keys)``, contiguous.
    """
    if dropout == 0 or seed is None:
        return p
    if not runs_triton(p):
        return torch.empty_like(p) if is_traced(p) else after_dropout(p, seed, heads, dropout)
    images, rows, keys = p.shape
    dropped = torch.empty_like(p)
    drop_probabilities_kernel(
        keys, lambda blocks: (images * rows,),
        p, seed, threshold(dropout), 1 / (1 - dropout), dropped,
        rows // heads, keys, triton.next_power_of_2(keys),
    )  # fmt: skip
    return dropped


def head_product(
    a: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """``out[b, m, h] = scale * a[b, m, h] @ weight[h] + total[b, h, m] * bias[h]``.

    a: ``(images, queries, heads, inner)``, weight: ``(heads, inner, cols)`` of any strides, out:
    ``(images, queries, heads, cols)``; last strides of a and out are 1.
    """
    if a.is_cuda and a.dtype == torch.float32:  # no tensor cores: cuBLAS is worth its copies
        torch.mul(torch.einsum("bmhi,hic->bmhc", a, weight), scale, out=out)
        if bias is not None and total is not None:
            out.add_(total.transpose(1, 2).unsqueeze(-1) * bias.view(a.shape[2], -1))
        return
    images, queries, heads, inner = a.shape
    cols, rows = out.shape[3], images * queries

    def grid(blocks: dict[str, int]) -> tuple[int, ...]:
        tiles = triton.cdiv(rows, blocks["BLOCK_ROWS"]) * triton.cdiv(cols, blocks["BLOCK_COLS"])
        return (tiles * heads,)

    head_product_kernel(
        rows, grid, a, *a.stride()[:3], weight, *weight.stride(), bias, total,
        out, *out.stride()[:3], rows, queries, heads, inner, cols, scale, precision(),
    )  # fmt: skip


def head_weight_gradient(a: Tensor, b: Tensor, *, scale: float = 1.0) -> Tensor:
    """``scale * sum over images and queries of a[b, m, h] (outer) b[b, m, h]``, one per head."""
    if a.is_cuda and a.dtype == torch.float32:
        return torch.einsum("bmhr,bmhc->hrc", a, b).mul_(scale)
    images, queries, heads, rows = a.shape
    cols, tokens = b.shape[3], images * queries
    out = a.new_empty(heads, rows, cols)

    def grid(blocks: dict[str, int]) -> tuple[int, ...]:
        tiles = triton.cdiv(rows, blocks["BLOCK_ROWS"]) * triton.cdiv(cols, blocks["BLOCK_COLS"])
        return (tiles * heads,)

    head_weight_gradient_kernel(
        tokens, grid, a, *a.stride()[:3], b, *b.stride()[:3], out,
        tokens, queries, heads, rows, cols, scale, precision(),
    )  # fmt: skip
    return out


def _scores(a: Tensor, x: Tensor) -> Tensor:
    """``a @ x^T`` for every image, in fp32: a score rounded to bf16 is off by up to 2^-9 of it."""
    if a.dtype == torch.float32:
        return torch.bmm(a, x.transpose(1, 2))
    if a.is_cuda:
        return torch.bmm(a, x.transpose(1, 2), out_dtype=torch.float32)
    return torch.bmm(a.float(), x.float().transpose(1, 2))
