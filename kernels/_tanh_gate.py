"""Tile operations that the forward and backward kernels of `gated_add` share."""

from __future__ import annotations

from ._triton import tl, triton


@triton.jit
def _tanh(x):
    # The argument of exp is never positive, so nothing overflows.
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    # Near 0, 1 - e cancels; there the Taylor series is exact to fp32.
    square = x * x
    series = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.1, series, tl.where(x < 0, -t, t))


@triton.jit
def _load_gate(gate_ptr, col, inside_cols, PER_FEATURE: tl.constexpr):
    if PER_FEATURE:
        return tl.load(gate_ptr + col, mask=inside_cols, other=0.0).to(tl.float32)
    else:
        return tl.load(gate_ptr + tl.arange(0, 1)).to(tl.float32)


@triton.jit
def load_gate(gate_ptr, col, inside_cols, PER_FEATURE: tl.constexpr):
    """tanh of the gate, ``[cols]``, or ``[1]`` for one number."""
    gate = _load_gate(gate_ptr, col, inside_cols, PER_FEATURE)
    return _tanh(gate)


@triton.jit
def load_gate_slope(gate_ptr, col, inside_cols, PER_FEATURE: tl.constexpr):
    """The derivative of tanh at the gate, 1 - tanh^2, without its cancellation; same shape."""
    e = tl.exp(-2.0 * tl.abs(_load_gate(gate_ptr, col, inside_cols, PER_FEATURE)))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def load_masked_rows(y_ptr, row, inside_rows, col, inside_cols, y_batch, y_token, tokens, kept_ptr):
    """Load rows of y in fp32, zeros where the row mask is false; return the mask too."""
    batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    kept = inside_rows
    if kept_ptr is not None:
        kept = tl.load(kept_ptr + row, mask=inside_rows, other=0) != 0
    at = y_ptr + (batch * y_batch + token * y_token)[:, None] + col[None, :]
    return tl.load(at, mask=kept[:, None] & inside_cols[None, :], other=0.0).to(tl.float32), kept
