"""The kernel of `add_layer_norm`'s backward; a program takes consecutive rows, whole.

It loads some rows while it computes others, and sums its share of the parameters' gradients.
"""

from __future__ import annotations

from ._dropout import keep_tile
from ._launcher import Config, kernel
from ._pipeline import stages
from ._sum_shares import store_share
from ._triton import tl, triton


# Two programs of the first config fit on a multiprocessor if rows have at most 4,096 columns. The
# second is for wider ones and for a single program.
@kernel(
    Config({"ELEMENTS": 2048}, num_warps=8),
    Config({"ELEMENTS": 4096}, num_warps=16),
    choose=int,
)
@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def add_layer_norm_backward_kernel(
    dy_ptr, z_ptr,  # (rows, cols)
    mean_ptr, rstd_ptr,  # (rows,)
    weight_ptr,  # (cols,)
    seed_ptr, drop_below, survivor_scale,
    dz_ptr, dx_ptr,  # (rows, cols) or None
    dweight_ptr, dbias_ptr, dx_bias_ptr,  # (cols,) or None
    shares_ptr, shares_row,  # (programs, cols of all three) fp32, or None for one program
    rows, rows_per_program, cols,
    BLOCK_COLS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = ELEMENTS // BLOCK_COLS if ELEMENTS > BLOCK_COLS else 1
    BITS: tl.constexpr = dy_ptr.dtype.element_ty.primitive_bitwidth
    STAGES: tl.constexpr = stages(BITS, 2 * ROWS * BLOCK_COLS, 16 * ELEMENTS)
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_COLS)
    inside_cols = col < cols
    weight = tl.load(weight_ptr + col, mask=inside_cols, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK_COLS], dtype=tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_COLS], dtype=tl.float32)
    dx_bias = tl.zeros([ROWS, BLOCK_COLS], dtype=tl.float32)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for start in tl.range(0, rows_per_program, ROWS, num_stages=STAGES):
        row = first + start + tl.arange(0, ROWS)
        inside_rows = row < last
        inside = inside_rows[:, None] & inside_cols[None, :]
        offset = row[:, None] * cols + col[None, :]
        # What lies outside is 0 in dy and rstd, so it adds nothing to any sum.
        dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=inside_rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=inside_rows, other=0.0)
        normed = (z - mean[:, None]) * rstd[:, None]
        dnormed = dy * weight[None, :]
        # Both sums at once take one exchange between the warps.
        sums = tl.sum(tl.join(dnormed * normed, dnormed), axis=1)
        along, shift = tl.split(sums / cols)
        # The mean first, and rstd last: what cancels is not rounded before.
        dz = (dnormed - shift[:, None] - normed * along[:, None]) * rstd[:, None]
        if dz_ptr is not None:
            tl.store(dz_ptr + offset, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        if seed_ptr is not None:
            dz *= survivor_scale * keep_tile(
                tl.load(seed_ptr), col[None, :], row.to(tl.int32)[:, None], 0, drop_below
            )
        if dx_ptr is not None:
            tl.store(dx_ptr + offset, dz.to(dx_ptr.dtype.element_ty), mask=inside)
        if dweight_ptr is not None:
            dweight += dy * normed
        if dbias_ptr is not None:
            dbias += dy
        if dx_bias_ptr is not None:
            dx_bias += dz
    at = program * shares_row
    if dweight_ptr is not None:
        store_share(dweight_ptr, shares_ptr, at, tl.sum(dweight, axis=0), col, inside_cols)
        at += cols
    if dbias_ptr is not None:
        store_share(dbias_ptr, shares_ptr, at, tl.sum(dbias, axis=0), col, inside_cols)
        at += cols
    if dx_bias_ptr is not None:
        store_share(dx_bias_ptr, shares_ptr, at, tl.sum(dx_bias, axis=0), col, inside_cols)
