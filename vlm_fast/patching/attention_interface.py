"""The second door into transformers: an attention implementation by name.

    vlm_fast.register_attention()
    model.set_attn_implementation({"qformer_config": "vlm_fast"})

Every module that dispatches its attention then runs `vlm_fast.ops.cross_attention`. `patch` does
more (projections, norms, feed forward networks); this serves models it does not know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast import ops

NAME = "vlm_fast"


def register_attention(name: str = NAME) -> str:
    """Make ``name`` an attention implementation of transformers, with its masks; returns it.

    Attention that is causal by itself, without a mask, goes to transformers' own SDPA: few-query
    kernels have nothing to offer there. So does what `vlm_fast.ops.cross_attention` does not take.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask_of_attention)
    return name


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' signature: ``(batch, heads, tokens, d)`` in, ``(batch, tokens, heads, d)`` out.

    A mask is boolean, true where a key is seen, or additive; ``(batch, heads, queries, keys)``, any
    size 1. What the op does not take goes to transformers' own SDPA: attention that is causal by
    itself, values of another width than keys, a position bias, masks of other shapes or dtypes.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    by_itself = causal and attention_mask is None and query.shape[2] > 1
    biased = kwargs.get("position_bias") is not None
    if by_itself or biased or not _fits(query, key, value, attention_mask):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    key_mask, bias = None, attention_mask
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        if attention_mask.shape[1] == attention_mask.shape[2] == 1:
            key_mask, bias = attention_mask[:, 0, 0].expand(key.shape[0], key.shape[2]), None
        else:
            bias = torch.zeros_like(attention_mask, dtype=query.dtype)
            bias.masked_fill_(~attention_mask, -torch.inf)
    seed = None
    if dropout > 0:
        seed = torch.randint(2**62, (), dtype=torch.int64, device=query.device)
    if query.shape[0] == 1 != key.shape[0]:  # one batch of queries for all
        query = query.expand(key.shape[0], -1, -1, -1)
    attended = ops.cross_attention(
        query, key, value, None, None, bias, key_mask, seed, scale=scaling, dropout=dropout
    )
    return attended.transpose(1, 2), None


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the op takes these: keys and values alike, and a mask that says all four sizes."""
    batch, heads, queries, d = query.shape
    images, kv_heads, keys, _ = key.shape
    if value.shape != key.shape or key.shape[3] != d or batch not in (1, images):
        return False
    if kv_heads == 0 or heads % kv_heads:
        return False
    if mask is None:
        return True
    if mask.dtype not in (torch.bool, torch.float32, query.dtype) or mask.ndim != 4:
        return False
    scores = (images, heads, queries, keys)
    return all(n in (1, size) for n, size in zip(mask.shape, scores, strict=True))


def mask_of_attention(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask `attend` takes; of mere padding a row for each sample, and no look at its values."""
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    if mask_function is bidirectional_mask_function and not kwargs.get("use_vmap"):
        if attention_mask is None:
            return None
        seen: Tensor = attention_mask[:, None, None, kv_offset : kv_offset + kv_length] != 0
        return seen
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, **kwargs,
    )  # fmt: skip
