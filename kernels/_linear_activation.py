"""Linear plus activation in one launch, for few rows and calls without gradients."""

from __future__ import annotations

from torch import Tensor

from ._activation import value_and_slope
from ._launcher import Config, kernel, precision
from ._sizes import cdiv
from ._triton import tl, triton

FEW_ROWS = 512  # 16 images of 32 queries; up to here a saved launch outweighs cuBLAS's better tiles


@kernel(Config({"BLOCK_ROWS": 32, "BLOCK_COLS": 64, "BLOCK_INNER": 64}, num_warps=4, num_stages=3))
@triton.jit(do_not_specialize=["rows"])
def linear_activation_kernel(
    x_ptr, x_row,  # (rows, inner) with this row stride
    weight_ptr,  # (cols, inner)
    bias_ptr,  # (cols,) or None
    out_ptr,  # (rows, cols)
    rows, inner, cols,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    # Consecutive programs share columns, so they read their weights from L2.
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    program = tl.program_id(0)
    row = (program % row_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = (program // row_blocks).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside_rows, inside_cols = row < rows, col < cols
    z = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.float32)
    for start in range(0, inner, BLOCK_INNER):
        i = start + tl.arange(0, BLOCK_INNER)
        inside = i < inner
        x = tl.load(
            x_ptr + row[:, None] * x_row + i[None, :],
            mask=inside_rows[:, None] & inside[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + col[None, :] * inner + i[:, None],
            mask=inside[:, None] & inside_cols[None, :],
            other=0.0,
        )
        z = tl.dot(x, weight, z, input_precision=PRECISION)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + col, mask=inside_cols, other=0.0).to(tl.float32)[None, :]
    # Rounded, as a separate linear stores it.
    z = z.to(out_ptr.dtype.element_ty).to(tl.float32)
    h, _ = value_and_slope(z, ACTIVATION)
    inside = inside_rows[:, None] & inside_cols[None, :]
    tl.store(
        out_ptr + row[:, None] * cols + col[None, :], h.to(out_ptr.dtype.element_ty), mask=inside
    )


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Return ``activate(F.linear(x, weight, bias))``, ``(rows, cols)``, from one Triton launch.

    x: ``(rows, inner)``, inner stride 1. For few rows and calls without gradients, because the
    pre-activation is not stored.
    """
    rows, inner = x.shape
    cols = weight.shape[0]
    out = x.new_empty(rows, cols)

    def grid(blocks: dict[str, int]) -> tuple[int, ...]:
        return (cdiv(rows, blocks["BLOCK_ROWS"]) * cdiv(cols, blocks["BLOCK_COLS"]),)

    linear_activation_kernel(
        grid, x, x.stride(0), weight.contiguous(),
        bias if bias is None else bias.contiguous(), out,
        rows, inner, cols, activation, precision(x.dtype),
    )  # fmt: skip
    return out
