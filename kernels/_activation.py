"""Activation functions inside kernels: the value and the derivative, in fp32."""

from __future__ import annotations

from ._triton import tl, triton

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_TAU = tl.constexpr(0.3989422804014327)
TANH_SCALE = tl.constexpr(0.7978845608028654)
TANH_CUBIC = tl.constexpr(0.044715)
QUICK_SCALE = tl.constexpr(1.702)


@triton.jit
def value_and_slope(z, ACTIVATION: tl.constexpr):
    """f(z) and f'(z) of a tile of fp32. NaN and Inf give what ATen's formulas give."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.math.erf(z * SQRT_HALF))
        return z * cdf, cdf + z * INV_SQRT_TAU * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        # tanh(u) = 2 sigmoid(2u) - 1. Every backend and the interpreter have exp, but not tanh.
        inner = 2 * TANH_SCALE * (z + TANH_CUBIC * z * z * z)
        inner_slope = 2 * TANH_SCALE * (1 + 3 * TANH_CUBIC * z * z)
        gate = tl.sigmoid(inner)
        # sigmoid(-inner) and not 1 - gate: where the gate is nearly 1, the rounding error of
        # 1 - gate would be multiplied by a large inner_slope.
        return z * gate, gate + z * gate * tl.sigmoid(-inner) * inner_slope
    elif ACTIVATION == "quick_gelu":
        gate = tl.sigmoid(QUICK_SCALE * z)
        return z * gate, gate + z * gate * (1 - gate) * QUICK_SCALE
    elif ACTIVATION == "silu":
        gate = tl.sigmoid(z)
        return z * gate, gate + z * gate * (1 - gate)
    else:
        tl.static_assert(ACTIVATION == "relu")
        # `z <= 0` and not maximum(): NaN must stay NaN and have the slope 1, as in ATen.
        return tl.where(z <= 0, 0.0, z), tl.where(z <= 0, 0.0, 1.0)
