"""The kernel of `gated_add`'s backward; a program takes consecutive rows, whole.

A program writes its partial sums of the gate's and the norm's gradients to its own row of a buffer:
no atomics, one fixed order of summation.
"""

from __future__ import annotations

from ._launcher import Config, kernel
from ._tanh_gate import load_gate, load_masked_rows
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
    dgate_ptr, dweight_ptr, dbias_ptr,  # (programs, cols) fp32 or None
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
