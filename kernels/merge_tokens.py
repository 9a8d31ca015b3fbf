"""Sums or means of the tokens that merge into one token, and the inverse copy; a program per row.

``destination``, ``order`` and ``start`` are those of `bipartite_match`. Each row is read once, in
a fixed order and without atomics. A number out of range is never used as an address: on a GPU its
row is left out, on a CPU it raises IndexError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launcher import Config, dense, is_traced, kernel, runs_triton
from ._native import native
from ._triton import tl, triton

NATIVE = {torch.float32: 0, torch.bfloat16: 1}  # as numbered by Element in csrc


@kernel(Config({"BLOCK_COLS": 512}, num_warps=2))
@triton.jit(do_not_specialize=["tokens", "merged"])
def sum_tokens_kernel(
    x_ptr, x_batch, x_token,  # (batch, tokens, cols), inner stride 1
    size_ptr,  # (batch, tokens) fp32, or None: all 1
    order_ptr, start_ptr,
    out_ptr,  # (batch, merged, cols)
    total_ptr,  # (batch, merged) fp32, or None
    tokens, merged, cols, MEAN: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    image = row // merged
    at = start_ptr + row + image  # an image has merged + 1 starts
    first, last = tl.maximum(tl.load(at), 0), tl.minimum(tl.load(at + 1), tokens)
    members = order_ptr + image * tokens
    total = 0.0
    if size_ptr is None:
        total += last - first
    else:
        for i in range(first, last):
            token = tl.load(members + i).to(tl.int64)
            inside = (token >= 0) & (token < tokens)
            total += tl.load(size_ptr + image * tokens + token, mask=inside, other=0.0)
    if total_ptr is not None:
        tl.store(total_ptr + row, total)
    for start in range(0, cols, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS)
        sums = tl.zeros([BLOCK_COLS], tl.float32)
        for i in range(first, last):
            token = tl.load(members + i).to(tl.int64)
            inside = (token >= 0) & (token < tokens)
            at_x = x_ptr + image * x_batch + token * x_token + col
            x = tl.load(at_x, mask=(col < cols) & inside, other=0.0).to(tl.float32)
            if MEAN:
                weight = 1.0
                if size_ptr is not None:
                    weight = tl.load(size_ptr + image * tokens + token, mask=inside, other=0.0)
                x *= tl.math.div_rn(weight, total)  # exactly 1 for a group of one token
            sums += x
        tl.store(out_ptr + row * cols + col, sums.to(out_ptr.dtype.element_ty), mask=col < cols)


@kernel(Config({"BLOCK_COLS": 512}, num_warps=2))
@triton.jit(do_not_specialize=["tokens", "merged"])
def spread_tokens_kernel(
    y_ptr, y_batch, y_token,  # (batch, merged, cols), inner stride 1
    destination_ptr,
    size_ptr, total_ptr,  # (batch, tokens) and (batch, merged) fp32, or None
    out_ptr,  # (batch, tokens, cols)
    tokens, merged, cols, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    image = row // tokens
    group = tl.load(destination_ptr + row).to(tl.int64)
    inside = (group >= 0) & (group < merged)
    scale = 1.0
    if total_ptr is not None:
        if size_ptr is not None:
            scale = tl.load(size_ptr + row)
        total = tl.load(total_ptr + image * merged + group, mask=inside, other=1.0)
        scale = tl.math.div_rn(scale, total)
    for start in range(0, cols, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS)
        at_y = y_ptr + image * y_batch + group * y_token + col
        y = tl.load(at_y, mask=(col < cols) & inside, other=0.0).to(tl.float32)
        found = (y * scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * cols + col, found, mask=col < cols)


@kernel(Config({"BLOCK_COLS": 512}, num_warps=2))
@triton.jit(do_not_specialize=["tokens", "merged"])
def row_products_kernel(
    x_ptr, x_batch, x_token,  # (batch, tokens, cols), inner stride 1
    y_ptr, y_batch, y_token,  # (batch, merged, cols), inner stride 1
    destination_ptr,
    product_ptr,  # (batch, tokens) fp32
    tokens, merged, cols, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    image, token = row // tokens, row % tokens
    group = tl.load(destination_ptr + row).to(tl.int64)
    inside = (group >= 0) & (group < merged)
    products = tl.zeros([BLOCK_COLS], tl.float32)
    for start in range(0, cols, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS)
        at_x = x_ptr + image * x_batch + token * x_token + col
        at_y = y_ptr + image * y_batch + group * y_token + col
        x = tl.load(at_x, mask=col < cols, other=0.0).to(tl.float32)
        products += x * tl.load(at_y, mask=(col < cols) & inside, other=0.0).to(tl.float32)
    tl.store(product_ptr + row, tl.sum(products))


def sum_tokens(
    x: Tensor, order: Tensor, start: Tensor, size: Tensor | None = None, *, mean: bool
) -> tuple[Tensor, Tensor | None]:
    """Return sums ``(batch, merged, cols)``, or means weighted by size and the total sizes.

    x: ``(batch, tokens, cols)``; size: fp32 ``(batch, tokens)``, contiguous, or None for ones. The
    totals ``(batch, merged)``, fp32, are None without ``mean``.
    """
    batch, tokens, cols = x.shape
    merged = start.shape[1] - 1
    out = x.new_empty(batch, merged, cols)
    total = x.new_empty(batch, merged, dtype=torch.float32) if mean else None
    x = dense(x)
    order, start = order.contiguous(), start.contiguous()
    if runs_triton(x):
        sum_tokens_kernel(
            lambda blocks: (batch * merged,),
            x, *x.stride()[:2], size, order, start, out, total, tokens, merged, cols, mean,
        )  # fmt: skip
    elif is_traced(x):
        pass
    elif native is not None and x.is_cpu and x.dtype in NATIVE:
        native.sum_tokens(
            NATIVE[x.dtype], x.data_ptr(), *x.stride()[:2], _address(size), order.data_ptr(),
            start.data_ptr(), out.data_ptr(), _address(total), batch, tokens, merged, cols,
            torch.get_num_threads(),
        )  # fmt: skip
    else:
        _sum_aten(x, order, start, size, out, total)
    return out, total


def spread_tokens(
    y: Tensor, destination: Tensor, size: Tensor | None = None, total: Tensor | None = None
) -> Tensor:
    """Return ``(batch, tokens, cols)``: for each token the row of its merged token.

    y: ``(batch, merged, cols)``; size and total as in `sum_tokens`. With a total, each row is
    multiplied by the token's share of it.
    """
    batch, tokens = destination.shape
    merged, cols = y.shape[1:]
    out = y.new_empty(batch, tokens, cols)
    y, destination = dense(y), destination.contiguous()
    if runs_triton(y):
        spread_tokens_kernel(
            lambda blocks: (batch * tokens,),
            y, *y.stride()[:2], destination, size, total, out, tokens, merged, cols,
        )  # fmt: skip
    elif is_traced(y):
        pass
    elif native is not None and y.is_cpu and y.dtype in NATIVE:
        native.spread_tokens(
            NATIVE[y.dtype], y.data_ptr(), *y.stride()[:2], destination.data_ptr(),
            _address(size), _address(total), out.data_ptr(), batch, tokens, merged, cols,
            torch.get_num_threads(),
        )  # fmt: skip
    else:
        torch.gather(y, 1, _rows(destination, cols), out=out)
        if total is not None:
            share = shares(destination, size, total).unsqueeze(2)
            out.copy_(out * share)  # the product in fp32
    return out


def row_products(x: Tensor, y: Tensor, destination: Tensor) -> Tensor:
    """fp32 ``(batch, tokens)``: the inner product of each token of x and its merged token in y."""
    batch, tokens, cols = x.shape
    products = x.new_empty(batch, tokens, dtype=torch.float32)
    x, y, destination = dense(x), dense(y), destination.contiguous()
    if runs_triton(x):
        row_products_kernel(
            lambda blocks: (batch * tokens,),
            x, *x.stride()[:2], y, *y.stride()[:2], destination, products,
            tokens, y.shape[1], cols,
        )  # fmt: skip
    elif not is_traced(x):
        found = y.gather(1, _rows(destination, cols)).float().mul_(x)
        torch.sum(found, 2, out=products)
    return products


def shares(destination: Tensor, size: Tensor | None, total: Tensor) -> Tensor:
    """``(batch, tokens)``: the size of each token divided by the size of its merged token."""
    whole = total.gather(1, destination.long())
    return whole.reciprocal() if size is None else size / whole


def _sum_aten(
    x: Tensor, order: Tensor, start: Tensor, size: Tensor | None, out: Tensor, total: Tensor | None
) -> None:
    # The order of summation is fixed, because index_add_ on a CPU adds one row after another.
    merged = start.shape[1] - 1
    counts = start.diff(dim=1)
    ends_fit = (start[:, 0] == 0).all() and (start[:, -1] == order.shape[1]).all()
    if not ends_fit or (counts < 0).any():
        raise IndexError("a match has a number that is out of range")
    for image in range(len(x)):
        members = order[image].long()
        of = torch.arange(merged, device=x.device).repeat_interleave(counts[image].long())
        rows = x[image].index_select(0, members).float()
        if total is not None:
            own = rows.new_ones(len(members)) if size is None else size[image][members]
            total[image].zero_().index_add_(0, of, own)
            rows.mul_((own / total[image][of]).unsqueeze(1))
        out[image] = rows.new_zeros(merged, rows.shape[1]).index_add_(0, of, rows).to(out.dtype)


def _rows(destination: Tensor, cols: int) -> Tensor:
    return destination.long().unsqueeze(2).expand(-1, -1, cols)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
