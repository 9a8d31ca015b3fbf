"""Tile operations of media attention's backward in 16 bits.

A tile lies ``[rows, keys]`` or ``[keys, rows]``; KEYS is the axis of the keys. ``lse`` and
``delta`` are the logarithm of the sum of exponentials and the mean of dp of each row, see
`_attention_gradient_tiles`.
"""

from __future__ import annotations

from ._attention_tiles import LOG2_E
from ._triton import tl, triton


@triton.jit
def scale_of_dp(
    unattended_rows, scale, UNATTENDED: tl.constexpr, dtype: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """The factor of dp, to be broadcast to a tile.

    In bf16 ds includes the factor ``scale``; in fp16 that would make small numbers subnormal. The
    factor is 0 for rows whose weights are equal, so that their scores get no gradient.
    """
    factor = scale if dtype == tl.bfloat16 else scale * 0.0 + 1.0
    if UNATTENDED == "uniform":
        factor = tl.expand_dims(tl.where(unattended_rows, 0.0, factor), KEYS)
    return factor


@triton.jit
def media_probabilities_and_gradients(
    s, dp, lse, delta, inside_keys, seen, scale, factor, KEYS: tl.constexpr
):  # fmt: skip
    """A tile of p and of ds from the products s and dp.

    ``seen`` marks the rows that see the medium. ``factor`` is that of dp, see `scale_of_dp`, which
    ``delta`` includes.
    """
    exponent = s * (scale * LOG2_E) - tl.expand_dims(lse, KEYS)
    visible = tl.expand_dims(inside_keys, 1 - KEYS) & tl.expand_dims(seen, KEYS)
    p = tl.exp2(tl.where(visible, exponent, -float("inf")))
    ds = p * (dp * factor - tl.expand_dims(delta, KEYS))
    return p, tl.where(p != 0.0, ds, 0.0)  # 0 even where a hidden value is not finite
