"""The kernel of `gated_add`'s backward; a program takes consecutive rows, whole.

It loads some rows while it computes others, and sums its share of the gradients of the gate and of
the norm's parameters.
"""

from __future__ import annotations

from ._launcher import Config, kernel
from ._pipeline import stages
from ._sum_shares import store_share
from ._tanh_gate import load_gate, load_gate_slope
from ._triton import tl, triton


# Two programs of the first config fit on a multiprocessor if rows have at most 2,048 columns. The
# second is for wider ones and for a single program.
@kernel(
    Config({"ELEMENTS": 2048}, num_warps=8),
    Config({"ELEMENTS": 4096}, num_warps=16),
    choose=int,
)
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
    BITS: tl.constexpr = dh_ptr.dtype.element_ty.primitive_bitwidth
    STREAMS: tl.constexpr = 2 if NORM == "none" else 4
    STAGES: tl.constexpr = stages(BITS, STREAMS * ROWS * BLOCK_COLS, 16 * ELEMENTS)
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_COLS)
    inside_cols = col < cols
    gate = load_gate(gate_ptr, col, inside_cols, PER_FEATURE)
    if NORM != "none":
        weight = tl.load(weight_ptr + col, mask=inside_cols, other=0.0).to(tl.float32)
    dgate = tl.zeros([ROWS, BLOCK_COLS], dtype=tl.float32)
    dweight = tl.zeros([ROWS, BLOCK_COLS], dtype=tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_COLS], dtype=tl.float32)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for start in tl.range(0, rows_per_program, ROWS, num_stages=STAGES):
        row = first + start + tl.arange(0, ROWS)
        inside_rows = row < last
        inside = inside_rows[:, None] & inside_cols[None, :]
        offset = row[:, None] * cols + col[None, :]
        # What lies outside is 0 in dh, dnormed and rstd, so it adds nothing to any sum.
        if NORM != "none":
            dnormed = tl.load(dnormed_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            unit = tl.load(h_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + row, mask=inside_rows, other=0.0)
            if NORM == "layer":
                unit -= tl.load(mean_ptr + row, mask=inside_rows, other=0.0)[:, None]
            unit *= rstd[:, None]
            if dweight_ptr is not None:
                dweight += dnormed * unit
            if dbias_ptr is not None:
                dbias += dnormed
            dnormed *= weight[None, :]
            if NORM == "layer":  # both sums at once take one exchange between the warps
                sums = tl.sum(tl.join(dnormed * unit, dnormed), axis=1)
                along, shift = tl.split(sums / cols)
                dnormed -= shift[:, None]
            else:
                along = tl.sum(dnormed * unit, axis=1) / cols
            dnormed = (dnormed - unit * along[:, None]) * rstd[:, None]
        # Read only now, so that it takes no registers while warps wait for each other.
        dh = tl.load(dh_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if NORM != "none":
            dh += dnormed
        if dx_ptr is not None:
            tl.store(dx_ptr + offset, dh.to(dx_ptr.dtype.element_ty), mask=inside)
        if kept_ptr is not None:
            kept = tl.load(kept_ptr + row, mask=inside_rows, other=0) != 0
        else:
            kept = inside_rows
        if dy_ptr is not None:
            dy = tl.where(kept[:, None], dh * gate[None, :], 0.0)
            tl.store(dy_ptr + offset, dy.to(dy_ptr.dtype.element_ty), mask=inside)
        if dgate_ptr is not None:
            # Rows whose mask is false are read too, so that no load waits for another.
            batch, token = row // tokens, row % tokens
            at_y = y_ptr + (batch * y_batch + token * y_token)[:, None] + col[None, :]
            y = tl.load(at_y, mask=inside, other=0.0).to(tl.float32)
            dgate += tl.where(kept[:, None], dh * y, 0.0)
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
