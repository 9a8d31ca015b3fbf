"""Activation functions inside kernels: the value and the derivative, in fp32."""

from __future__ import annotations

from ._triton import tl, triton

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")

HALF_LOG2_E = tl.constexpr(0.7213475204444817)
INV_SQRT_TAU = tl.constexpr(0.3989422804014327)
TANH_SCALE = tl.constexpr(0.7978845608028654)
TANH_CUBIC = tl.constexpr(0.044715)
QUICK_SCALE = tl.constexpr(1.702)


@triton.jit
def value_and_slope(z, ACTIVATION: tl.constexpr):
    """f(z) and f'(z) of a tile of fp32. NaN and Inf give what ATen's formulas give."""
    if ACTIVATION == "gelu":
        tail = _normal_tail(tl.abs(z))
        cdf = tl.where(z > 0, 1 - tail, tail)
        return z * cdf, cdf + z * INV_SQRT_TAU * tl.exp2(-HALF_LOG2_E * z * z)
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


@triton.jit
def _normal_tail(x):
    """The probability that a normal variable is above x, for x from 0 on.

    The polynomial is fitted to the logarithm so that the probability is within 3e-9. That costs
    half as many instructions as erf, which chooses between two polynomials.
    """
    log = 5.626407e-07 - 1.3985373e-08 * x
    log = -8.790526e-06 + log * x
    log = 6.849675e-05 + log * x
    log = -0.0002633894 + log * x
    log = -2.0053390e-05 + log * x
    log = 0.006962962 + log * x
    log = -0.05244991 + log * x
    log = -0.4592181 + log * x
    log = -1.1511045 + log * x
    return 0.5 * tl.exp2(log * x)
