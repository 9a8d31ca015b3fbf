"""Arguments of the attention kernels: tensors with their strides, masks and dropout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._attention_tiles import strides
from ._dropout import threshold

# A tensor and its strides along images, heads and tokens; its last stride is 1.
Strided = tuple[Tensor | None, int, int, int]
Masks = tuple[Tensor | None, Tensor | None, Tensor | None]  # bias, key_mask, seed of dropout
ABSENT: Strided = (None, 0, 0, 0)
# o, lse and low of `attention_forward`; in fp32 and on a CPU nothing is kept.
Kept = tuple[Tensor | None, Tensor | None, Tensor | None]
NOTHING_KEPT: Kept = (None, None, None)
KeptByStrides = tuple[Strided, Tensor | None, Strided]
_NO_MASKS = (None, 0, 0, 0, 0, None, 0, 0, None, 0, 1.0)


def by_strides(x: Tensor | None) -> Strided:
    """The argument for ``(images, heads, tokens, d)``, or for None."""
    return ABSENT if x is None else (x, *x.stride()[:3])  # type: ignore[return-value]


def new_kept(
    o: Tensor, shape: Sequence[int], *, with_low: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Memory for lse, of this shape, and low, which the forward keeps; None in fp32."""
    if o.dtype is torch.float32:
        return None, None
    lse = o.new_empty(shape, dtype=torch.float32)
    return lse, torch.empty_like(o) if with_low else None


def kept_by_strides(o: Tensor | None, lse: Tensor | None, low: Tensor | None) -> KeptByStrides:
    """The argument for what the forward has kept; o and low are ``(images, heads, tokens, d)``."""
    return (ABSENT, None, ABSENT) if lse is None else (by_strides(o), lse, by_strides(low))


def call_sizes(q: Tensor, k: Tensor, k2: Tensor | None) -> tuple[int, ...]:
    """Batch, heads, kv_heads, queries, keys, keys2 and d of a call of `cross_attention`."""
    batch, heads, queries, d = q.shape
    keys2 = 0 if k2 is None else k2.shape[2]
    return batch, heads, k.shape[1], queries, k.shape[2], keys2, d


def mask_arguments(
    masks: Masks, dropout: float, shape: tuple[int, int, int, int]
) -> tuple[object, ...]:
    """The arguments for masks and dropout of scores of this shape."""
    bias, key_mask, seed = masks
    seed = seed if dropout > 0 else None
    if bias is None and key_mask is None and seed is None:
        return _NO_MASKS
    return (
        bias, *_score_strides(bias, shape),
        None if key_mask is None else key_mask.view(torch.uint8),  # which Triton loads
        *strides(key_mask, 2), seed, threshold(dropout), 1 / (1 - dropout),
    )  # fmt: skip


def _score_strides(bias: Tensor | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of the bias, 0 along dimensions in which it is broadcast to ``shape``."""
    if bias is None:
        return (0,) * 4
    return tuple(
        0 if n == 1 and size != 1 else s
        for n, size, s in zip(bias.shape, shape, bias.stride(), strict=True)
    )
