"""Dropout whose mask is computed from a seed and a position, so backward needs no stored mask.

An element at position ``(c0, c1, c2)`` is dropped where the first word of Philox-4x32-10 (Salmon
et al., SC 2011) at counter ``(c0, c1, c2, 0)`` under the seed is below ``p * 2**32``. Kernels and
plain PyTorch give the same mask, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


@triton.jit
def keep_tile(seed, c0, c1, c2, threshold):
    """1.0 where the element is kept, else 0.0. The int32 counters are broadcast."""
    shape: tl.constexpr = (c0 + c1 + c2).shape
    zero = tl.zeros(shape, tl.int32)
    word, _, _, _ = tl.philox(seed, zero + c0, zero + c1, zero + c2, zero)
    return tl.where(word.to(tl.int64) >= threshold, 1.0, 0.0)


def threshold(p: float) -> int:
    """An element is dropped if its random word is below this bound."""
    return int(p * 2**32)


def keep_mask(seed: Tensor, p: float, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """Plain PyTorch: the mask of `keep_tile` as bool. ``seed`` has one int64."""
    x0, x1, x2, x3 = (c.to(torch.int64) for c in torch.broadcast_tensors(c0, c1, c2, c0 * 0))
    seed = seed.reshape(())
    key_0, key_1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # The product of two 32-bit words overflows int64, but all of its 64 bits are right.
        a, b = x0 * _ROUND_A, x2 * _ROUND_B
        x0, x2 = ((b >> 32) & _WORD) ^ x1 ^ key_0, ((a >> 32) & _WORD) ^ x3 ^ key_1
        x1, x3 = b & _WORD, a & _WORD
        key_0, key_1 = (key_0 + _KEY_A) & _WORD, (key_1 + _KEY_B) & _WORD
    return x0 >= threshold(p)
