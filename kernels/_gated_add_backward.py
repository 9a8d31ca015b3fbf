"""The kernel of `gated_add`'s backward; a program takes consecutive rows, whole.

It computes its share of the gradients of the gate and of the norm's parameters.
"""

from __future__ import annotations

from ._launcher import Config, kernel
from ._sum_shares import store_share
from ._tanh_gate import load_gate, load_gate_slope, load_masked_rows
from ._triton import tl, triton


@kernel(Config({"ELEMENTS": 4096}, num_warps=16))
@triton.jit(do_not_specialize=["rows", "rows_per_program", "tokens"])
def gated_add_backward_kernel(
    dh_ptr, dnormed_ptr, h_ptr,  # (rows, cols); the last two are None without a norm
    mean_ptr, rstd_ptr,  # (rows,) or None
    weight_ptr,  # (cols,) or None
    y_ptr, y_batch, y_token,  # or None if dgate is not wanted
    gate_ptr, kept_ptr,  # (1,) or (cols,); (rows,) bytes or None
    dx_ptr, dy_ptr,  # (rows, cols) or None
    dweight_ptr, dbias_ptr, dgate_ptr,  # (cols,), the gate also (1,), or None
    shares_ptr, shares_row,  # (programs, cols of all three) fp32, or None for one program
    rows, rows_per_program, tokens, cols,
    PER_FEATURE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_COLS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = ELEMENTS // BLOCK_COLS if ELEMENTS > BLOCK_COLS else 1
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_COLS)
    inside_cols = col < cols
    gate = load_gate(gate_ptr, col, inside_cols, PER_FEATURE)
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
            y, _ = load_masked_rows(
                y_ptr, row.to(tl.int32), inside_rows, col, inside_cols,
                y_batch, y_token, tokens, kept_ptr,
            )  # fmt: skip
            dgate += tl.where(kept[:, None], tl.where(inside, dh, 0.0) * y, 0.0)
    at = program * shares_row
    if dweight_ptr is not None:
        store_share(dweight_ptr, shares_ptr, at, tl.sum(dweight, axis=0), col, inside_cols)
        at += cols
    if dbias_ptr is not None:
        store_share(dbias_ptr, shares_ptr, at, tl.sum(dbias, axis=0), col, inside_cols)
        at += cols
    if dgate_ptr is not None:
        total = tl.sum(dgate, axis=0)
        if not PER_FEATURE:  # in float64, because a sum over all features may nearly cancel
            total = tl.sum(total.to(tl.float64), axis=0, keep_dims=True)
            col = tl.arange(0, 1)
            inside_cols = col < 1
        total *= load_gate_slope(gate_ptr, col, inside_cols, PER_FEATURE)
        store_share(dgate_ptr, shares_ptr, at, total, col, inside_cols)
