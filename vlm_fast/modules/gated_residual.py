"""The tanh-gated residuals of the cross-attention layers of IDEFICS and Llama 3.2 Vision."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vlm_fast import ops
from vlm_fast.modules.parameter_access.activation import activation_name


def rms_norm(x: Tensor, norm: Any) -> Tensor:
    """Apply an RMSNorm of transformers to ``x (..., features)``, over the last dimension."""
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def why_not_gated_mlp(mlp: Any) -> str | None:
    """Why `vlm_fast.ops.gated_mlp`, which has no biases, cannot compute an MLP, or None."""
    for name in ("gate_proj", "up_proj", "down_proj"):
        if getattr(mlp, name).bias is not None:
            return f"mlp.{name}: it has a bias"
    return None


def gated_residuals(
    x: Tensor,
    attended: Tensor,
    attention_gate: Tensor,
    norm: Any,
    mlp: Any,
    mlp_gate: Tensor,
    *,
    attention_rows: Tensor | None = None,
    mlp_rows: Tensor | None = None,
) -> Tensor:
    """``h = x + tanh(attention_gate) * attended``, then ``h + tanh(mlp_gate) * mlp(norm(h))``.

    Args:
        x, attended: ``(batch, tokens, features)``.
        attention_gate, mlp_gate: ``(1,)``.
        norm: an RMSNorm of transformers.
        mlp: a module with ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``.
        attention_rows: bool ``(batch, tokens)``, true where the attention is added; None: all.
        mlp_rows: the same for the MLP; or floating factors of it, which get a gradient.

    Returns:
        ``(batch, tokens, features)``.
    """
    x, normed = ops.gated_add_norm(
        x, attended.to(x.dtype), attention_gate, norm.weight, None, attention_rows,
        eps=norm.variance_epsilon, norm="rms",
    )  # fmt: skip
    expanded = ops.gated_mlp(
        normed, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight,
        activation=activation_name(mlp.act_fn) or "",
    )  # fmt: skip
    if mlp_rows is not None and mlp_rows.is_floating_point():
        expanded, mlp_rows = mlp_rows.unsqueeze(-1) * expanded, None
    return ops.gated_add(x, expanded.to(x.dtype), mlp_gate, mlp_rows)
