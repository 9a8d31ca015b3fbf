"""``x + tanh(gate) y``, and the norm that follows, one pass over memory each way.

A program holds whole rows. Programs of backward take a fixed run of rows and leave their shares of
the gate's and the norm's gradients in a row of their own: no atomics, one order of summation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._launcher import Config, in_rows, kernel, runs_triton
from ._triton import tl, triton

MAX_PROGRAMS = 512  # of backward: four to a multiprocessor of the largest GPUs


@triton.jit
def _tanh(x):
    # Neither end overflows: exp of what is not positive.
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    # Where 1 - e cancels, the odd series is exact to fp32.
    square = x * x
    series = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.1, series, tl.where(x < 0, -t, t))


@triton.jit
def _load_gate(gate_ptr, col, inside_cols, PER_FEATURE: tl.constexpr):
    """tanh of the gate, ``[cols]``."""
    if PER_FEATURE:
        gate = tl.load(gate_ptr + col, mask=inside_cols, other=0.0).to(tl.float32)
    else:
        gate = tl.load(gate_ptr).to(tl.float32) + tl.zeros(col.shape, tl.float32)
    return _tanh(gate)


@triton.jit
def _load_y(y_ptr, row, inside_rows, col, inside_cols, y_batch, y_token, tokens, kept_ptr):
    """Rows of y in fp32, zeros where they are not kept; and which are."""
    batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    kept = inside_rows
    if kept_ptr is not None:
        kept = tl.load(kept_ptr + row, mask=inside_rows, other=0) != 0
    at = y_ptr + (batch * y_batch + token * y_token)[:, None] + col[None, :]
    return tl.load(at, mask=kept[:, None] & inside_cols[None, :], other=0.0).to(tl.float32), kept


@kernel(Config({"ELEMENTS": 2048}, num_warps=8))
@triton.jit(do_not_specialize=["rows", "tokens"])
def gated_add_kernel(
    x_ptr, x_batch, x_token,  # (batch, tokens, cols) at these strides, inner 1
    y_ptr, y_batch, y_token,
    gate_ptr,  # one, or (cols,)
    kept_ptr,  # (rows,) bytes, or None
    weight_ptr, bias_ptr,  # (cols,); of the norm, or None
    h_ptr, normed_ptr,  # (rows, cols)
    mean_ptr, rstd_ptr,  # (rows,) or None
    rows, tokens, cols, eps,
    PER_FEATURE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_COLS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = ELEMENTS // BLOCK_COLS if ELEMENTS > BLOCK_COLS else 1
    first = (tl.program_id(0).to(tl.int64) * ROWS).to(tl.int32)  # row numbers fit, offsets do not
    row = first + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_COLS)
    inside_rows, inside_cols = row < rows, col < cols
    inside = inside_rows[:, None] & inside_cols[None, :]
    batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    at = x_ptr + (batch * x_batch + token * x_token)[:, None] + col[None, :]
    h = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    y, kept = _load_y(y_ptr, row, inside_rows, col, inside_cols, y_batch, y_token, tokens, kept_ptr)
    gated = _load_gate(gate_ptr, col, inside_cols, PER_FEATURE)[None, :] * y
    h += tl.where(kept[:, None], gated, 0.0)
    offset = row.to(tl.int64)[:, None] * cols + col[None, :]
    tl.store(h_ptr + offset, h.to(h_ptr.dtype.element_ty), mask=inside)
    if NORM != "none":
        h = h.to(h_ptr.dtype.element_ty).to(tl.float32)  # as backward will find it
        spread = tl.where(inside, h, 0.0)
        if NORM == "layer":
            mean = tl.sum(spread, axis=1) / cols
            # Where the mean is far above the spread, its own rounding counts: taken out once more.
            rest = tl.sum(tl.where(inside, h - mean[:, None], 0.0), axis=1) / cols
            spread = tl.where(inside, h - mean[:, None] - rest[:, None], 0.0)
            if mean_ptr is not None:
                tl.store(mean_ptr + row, mean + rest, mask=inside_rows)
        rstd = 1.0 / tl.sqrt(tl.sum(spread * spread, axis=1) / cols + eps)
        if rstd_ptr is not None:
            tl.store(rstd_ptr + row, rstd, mask=inside_rows)
        weight = tl.load(weight_ptr + col, mask=inside_cols, other=0.0).to(tl.float32)
        normed = spread * rstd[:, None]
        if NORM == "rms":  # rounded before the weight, as Llama does
            normed = normed.to(normed_ptr.dtype.element_ty).to(tl.float32)
        normed *= weight[None, :]
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + col, mask=inside_cols, other=0.0).to(tl.float32)
            normed += bias[None, :]
        tl.store(normed_ptr + offset, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@kernel(Config({"ELEMENTS": 4096}, num_warps=16))
@triton.jit(do_not_specialize=["rows", "rows_per_program", "tokens"])
def gated_add_backward_kernel(
    dh_ptr, dnormed_ptr, h_ptr,  # (rows, cols); the latter two of a norm only
    mean_ptr, rstd_ptr,  # (rows,) or None
    weight_ptr,  # (cols,) or None
    y_ptr, y_batch, y_token,  # or None, where the gate's gradient is not wanted
    gate_ptr, kept_ptr,  # one or (cols,), and (rows,) bytes or None
    dx_ptr, dy_ptr,  # (rows, cols) or None
    dgate_ptr, dweight_ptr, dbias_ptr,  # (programs, cols) fp32 or None
    rows, rows_per_program, tokens, cols,
    PER_FEATURE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_COLS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = ELEMENTS // BLOCK_COLS if ELEMENTS > BLOCK_COLS else 1
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_COLS)
    inside_cols = col < cols
    gate = _load_gate(gate_ptr, col, inside_cols, PER_FEATURE)
    dgate = tl.zeros([ROWS, BLOCK_COLS], dtype=tl.float32)
    dweight = tl.zeros([ROWS, BLOCK_COLS], dtype=tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_COLS], dtype=tl.float32)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for start in range(0, rows_per_program, ROWS):
        row = first + start + tl.arange(0, ROWS)
        inside_rows = row < last
        inside = inside_rows[:, None] & inside_cols[None, :]
        offset = row[:, None] * cols + col[None, :]
        dh = tl.load(dh_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if NORM != "none":
            weight = tl.load(weight_ptr + col, mask=inside_cols, other=0.0).to(tl.float32)
            dnormed = tl.load(dnormed_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            h = tl.load(h_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + row, mask=inside_rows, other=0.0)
            if NORM == "layer":
                h -= tl.load(mean_ptr + row, mask=inside_rows, other=0.0)[:, None]
            unit = tl.where(inside, h * rstd[:, None], 0.0)
            dunit = dnormed * weight[None, :]
            dnorm = dunit - unit * (tl.sum(dunit * unit, axis=1) / cols)[:, None]
            if NORM == "layer":
                dnorm -= (tl.sum(dunit, axis=1) / cols)[:, None]
            dh += dnorm * rstd[:, None]
            if dweight_ptr is not None:
                dweight += dnormed * unit
            if dbias_ptr is not None:
                dbias += dnormed
        if dx_ptr is not None:
            tl.store(dx_ptr + offset, dh.to(dx_ptr.dtype.element_ty), mask=inside)
        kept = inside_rows
        if kept_ptr is not None:
            kept = tl.load(kept_ptr + row, mask=inside_rows, other=0) != 0
        if dy_ptr is not None:
            dy = tl.where(kept[:, None], dh * gate[None, :], 0.0)
            tl.store(dy_ptr + offset, dy.to(dy_ptr.dtype.element_ty), mask=inside)
        if dgate_ptr is not None:
            y, _ = _load_y(
                y_ptr, row, inside_rows, col, inside_cols, y_batch, y_token, tokens, kept_ptr
            )
            dgate += tl.where(kept[:, None], tl.where(inside, dh, 0.0) * y, 0.0)
    share = program * cols + col
    if dgate_ptr is not None:
        tl.store(dgate_ptr + share, tl.sum(dgate, axis=0), mask=inside_cols)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + share, tl.sum(dweight, axis=0), mask=inside_cols)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + share, tl.sum(dbias, axis=0), mask=inside_cols)


Statistics = tuple[Tensor | None, Tensor | None]  # mean, 1 / deviation, one for each row


def gated_add(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    row_mask: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 0.0,
    norm: str = "none",
) -> tuple[Tensor, Tensor | None, Statistics]:
    """h, its norm if there is one, both contiguous and like x, and the norm's statistics.

    x, y: ``(..., cols)``; gate: contiguous, of one or ``cols`` elements; row_mask: bool
    ``x.shape[:-1]``; parameters ``(cols,)``, contiguous.
    """
    if not runs_triton(x):
        return _aten(x, y, gate, row_mask, weight, bias, eps, norm)
    h = x.new_empty(x.shape)  # no view: it may be kept for backward too, and written to
    x, y = in_rows(x), in_rows(y)
    batch, tokens, cols = x.shape
    rows = batch * tokens
    normed = None if norm == "none" else torch.empty_like(h)
    rstd = None if norm == "none" else x.new_empty(rows, dtype=torch.float32)
    mean = torch.empty_like(rstd) if norm == "layer" and rstd is not None else None
    block = triton.next_power_of_2(cols)
    gated_add_kernel(
        lambda blocks: (triton.cdiv(rows, max(blocks["ELEMENTS"] // block, 1)),),
        x, *x.stride()[:2], y, *y.stride()[:2], gate, _bytes(row_mask), weight, bias,
        h, normed, mean, rstd, rows, tokens, cols, eps, gate.numel() > 1, norm, block,
    )  # fmt: skip
    return h, normed, (mean, rstd)


def gated_add_backward(
    dh: Tensor,
    dnormed: Tensor | None,
    h: Tensor | None,
    statistics: Statistics,
    y: Tensor | None,
    gate: Tensor,
    row_mask: Tensor | None,
    weight: Tensor | None,
    *,
    norm: str,
    want_x: bool,
    want_y: bool,
    want_gate: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Any, ...]:
    """Gradients of x and y like dh, and those of gate, weight and bias in fp32.

    dh, dnormed, h: ``(..., cols)``; y as in the forward, wanted for the gate.
    """
    if not runs_triton(dh):
        return _aten_backward(
            dh, dnormed, h, statistics, y, gate, row_mask, weight, norm,
            want_x, want_y, want_gate, want_weight, want_bias,
        )  # fmt: skip
    plain = norm == "none"  # dx is dh itself
    dh = dh.contiguous()
    dnormed = None if dnormed is None else dnormed.contiguous()
    y = None if y is None else in_rows(y)
    batch, tokens, cols = in_rows(dh).shape
    rows = batch * tokens
    dx = torch.empty_like(dh) if want_x and not plain else None
    dy = torch.empty_like(dh) if want_y else None
    rows_per_program = max(16, triton.cdiv(rows, MAX_PROGRAMS))
    programs = triton.cdiv(rows, rows_per_program)
    shares = [
        dh.new_empty(programs, cols, dtype=torch.float32) if want else None
        for want in (want_gate, want_weight, want_bias)
    ]
    gated_add_backward_kernel(
        lambda blocks: (programs,),
        dh, dnormed, h, *statistics, weight,
        y if want_gate else None, *(y.stride()[:2] if want_gate and y is not None else (0, 0)),
        gate, _bytes(row_mask), dx, dy, *shares, rows, rows_per_program, tokens, cols,
        gate.numel() > 1, norm, triton.next_power_of_2(cols),
    )  # fmt: skip
    dtanh, dweight, dbias = shares
    dgate = None if dtanh is None else _of_gate(dtanh, gate)
    dweight, dbias = (None if s is None else s.sum(0) for s in (dweight, dbias))
    return dh if plain and want_x else dx, dy, dgate, dweight, dbias


def _of_gate(dtanh: Tensor, gate: Tensor) -> Tensor:
    """The gate's gradient, flat, from shares ``(rows, cols)`` of that of its tanh.

    One number may be the sum of all rows and features, and these may all but cancel: in float64.
    """
    axes = (0, 1) if gate.numel() == 1 else (0,)
    dtanh = dtanh.sum(axes, dtype=torch.float64).view(-1)
    return dtanh / gate.double().view(-1).cosh().square()  # 1 - tanh^2, without its cancellation


def _bytes(row_mask: Tensor | None) -> Tensor | None:
    return None if row_mask is None else row_mask.contiguous().view(torch.uint8)


def _aten(
    x: Tensor, y: Tensor, gate: Tensor, row_mask: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, eps: float, norm: str,
) -> tuple[Tensor, Tensor | None, Statistics]:  # fmt: skip
    h = y.float() * gate.float().tanh().view(-1)
    if row_mask is not None:
        h.masked_fill_(~row_mask.unsqueeze(-1), 0)
    h = h.add_(x).to(x.dtype).contiguous()
    if norm == "none" or weight is None:
        return h, None, (None, None)
    if norm == "layer":
        normed, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], weight, bias, eps)
        return h, normed, (mean, rstd)
    wide = h.float()
    rstd = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    normed = (wide * rstd).to(h.dtype) * weight
    return h, normed.to(h.dtype), (None, rstd)


def _aten_backward(
    dh: Tensor, dnormed: Tensor | None, h: Tensor | None, statistics: Statistics,
    y: Tensor | None, gate: Tensor, row_mask: Tensor | None, weight: Tensor | None, norm: str,
    want_x: bool, want_y: bool, want_gate: bool, want_weight: bool, want_bias: bool,
) -> tuple[Any, ...]:  # fmt: skip
    dweight = dbias = dgate = dy = None
    total = dh
    if norm != "none":
        assert dnormed is not None and h is not None and weight is not None
        found, dweight, dbias = _norm_backward(
            dnormed, h, statistics, weight, want_weight, want_bias
        )
        total = found.add_(dh)
    wide = total.float()
    kept = None if row_mask is None else ~row_mask.unsqueeze(-1)
    if want_gate and y is not None:
        product = wide * y
        if kept is not None:
            product.masked_fill_(kept, 0)
        dgate = _of_gate(product.reshape(-1, product.shape[-1]), gate)
    if want_y:
        dy = wide * gate.float().tanh().view(-1)
        dy = (dy if kept is None else dy.masked_fill_(kept, 0)).to(dh.dtype)
    return total.to(dh.dtype) if want_x else None, dy, dgate, dweight, dbias


def _norm_backward(
    dnormed: Tensor, h: Tensor, statistics: Statistics, weight: Tensor,
    want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of h, in fp32, and of weight and bias."""
    mean, rstd = statistics
    if mean is not None:
        wants = [True, want_weight, want_bias]
        found = torch.ops.aten.native_layer_norm_backward(
            dnormed, h, h.shape[-1:], mean, rstd, weight, weight, wants
        )
        return found[0].float(), found[1], found[2]
    assert rstd is not None
    unit = h.float() * rstd
    dunit = dnormed.float() * weight
    dh = dunit - unit * (dunit * unit).mean(-1, keepdim=True)
    dweight = (dnormed * unit).view(-1, h.shape[-1]).sum(0) if want_weight else None
    return dh.mul_(rstd), dweight, None
