"""What an attention of transformers multiplies and drops, wherever a release keeps the numbers."""

from __future__ import annotations

from typing import Any

from torch import nn


def active_attention_dropout(attention: Any) -> float:
    """The probability of a dropout of attention weights, which is a child in some releases."""
    dropout = getattr(attention, "dropout", None)
    if isinstance(dropout, nn.Module):
        return float(dropout.p) if dropout.training else 0.0  # type: ignore[arg-type]
    return float(attention.attention_dropout) if attention.training else 0.0


def attention_scale(attention: Any) -> float:
    """What scores are multiplied by."""
    scaling = getattr(attention, "scaling", None)
    if scaling is not None:
        return float(scaling)
    d = getattr(attention, "head_dim", None)
    return float((attention.attention_head_size if d is None else d) ** -0.5)
