"""Register `vlm_fast.ops.cross_attention` as an attention implementation of transformers.

    vlm_fast.register_attention()
    model.set_attn_implementation({"qformer_config": "vlm_fast"})

Every module that selects its attention by ``config._attn_implementation`` then runs the op. `patch`
does more (projections, norms, feed-forward networks); this is for models that it does not know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast import ops

NAME = "vlm_fast"


def register_attention(name: str = NAME) -> str:
    """Register an attention implementation of transformers under ``name``; returns the name.

    Causal attention without a mask runs transformers' own SDPA instead, because these kernels are
    for few queries. So do calls that `vlm_fast.ops.cross_attention` does not support.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask_for)
    return name


def attention_forward(
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
    """Attention with the signature of transformers' attention functions.

    The following run transformers' own SDPA: causal attention without a mask, values of another
    width than the keys, a position bias, and masks of other shapes or dtypes.

    Args:
        module: the attention module; ``module.is_causal`` is read if ``is_causal`` is None.
        query, key, value: ``(batch, heads, tokens, d)``.
        attention_mask: ``(batch, heads, queries, keys)``, each size may be 1: boolean, true where a
            query attends to a key, or additive in float32 or the dtype of the query.
        dropout: probability with which attention weights are dropped.
        scaling: factor of the scores; ``d ** -0.5`` by default.
        is_causal: whether attention without a mask is causal.
        kwargs: ``position_bias``, and whatever else transformers passes to SDPA.

    Returns:
        ``(batch, queries, heads, d)``, and None for the attention maps.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal_without_mask = causal and attention_mask is None and query.shape[2] > 1
    biased = kwargs.get("position_bias") is not None
    if causal_without_mask or biased or not _fits(query, key, value, attention_mask):
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
    if query.shape[0] == 1 != key.shape[0]:  # the same queries for all images
        query = query.expand(key.shape[0], -1, -1, -1)
    attended = ops.cross_attention(
        query, key, value, None, None, bias, key_mask, seed, scale=scaling, dropout=dropout
    )
    return attended.transpose(1, 2), None


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the op supports these shapes and dtypes; the mask must have four dimensions."""
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


def attention_mask_for(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask for `attention_forward`, with the signature of transformers' mask functions.

    Without causality it is ``(batch, 1, 1, keys)``, made without reading values on the host.
    """
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
