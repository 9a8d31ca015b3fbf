"""Self-attention and a Q-Former's layer by separate linears, SDPA and LayerNorm of PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vlm_fast.benchmarks.providers.peer import Peer, Unavailable
from vlm_fast.ops.activations import activate
from vlm_fast.ops.qformer_layer_parameters import split

Function = Callable[..., Any]


def without_dropout(options: dict[str, Any]) -> None:
    """Raise `Unavailable` for dropout: SDPA draws its own masks."""
    if options.get("dropout") or options.get("attention_dropout"):
        raise Unavailable("draws other masks for dropout")


def attend(
    x: Tensor, kv: tuple[Tensor, Tensor], heads: int, mask: Tensor | None, scale: float | None
) -> Tensor:
    """SDPA of queries, keys and values of all heads, ``(batch, tokens, features)`` each."""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (x, *kv))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2).flatten(2)


def mask_of(bias: Tensor | None, key_mask: Tensor | None) -> Tensor | None:
    """What SDPA takes for a bias, or for a mask of keys."""
    if bias is not None and key_mask is not None:
        raise Unavailable("takes a bias or a mask, not both")
    return bias if key_mask is None else key_mask[:, None, None]


def self_attention(
    x: Tensor, parameters: list[Tensor], bias: Any = None, key_mask: Any = None, *_: Any,
    **options: Any,
) -> Function:  # fmt: skip
    without_dropout(options)
    mask_of(bias, key_mask)

    def call(
        x: Tensor, parameters: list[Tensor], bias: Any = None, key_mask: Any = None, *_: Any,
        heads: int, scale: float | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        q, k, v = (F.linear(x, parameters[i], parameters[i + 3]) for i in range(3))
        return attend(q, (k, v), heads, mask_of(bias, key_mask), scale)

    return call


def qformer_layer(hidden: Tensor, image_kv: Tensor | None, *rest: Any, **options: Any) -> Function:
    without_dropout(options)
    if options.get("text"):
        raise Unavailable("takes query tokens alone")
    if image_kv is not None and image_kv.shape[0] != hidden.shape[0]:
        raise Unavailable("takes a sequence for each image")

    def call(
        hidden: Tensor, image_kv: Tensor | None, parameters: list[Tensor], bias: Any = None,
        key_mask: Any = None, image_mask: Any = None, *_: Any, heads: int,
        scale: float | None = None, eps: float = 1e-12, activation: str = "gelu", **options: Any,
    ) -> Tensor:  # fmt: skip
        first, cross, last, _ = split(parameters, image_kv is not None, True)

        def normed(x: Tensor, residual: Tensor, tail: list[Tensor]) -> Tensor:
            weight, bias, *norm = tail
            return F.layer_norm(F.linear(x, weight, bias) + residual, norm[0].shape, *norm, eps)

        q, k, v = (F.linear(hidden, first[i], first[i + 3]) for i in range(3))
        x = attend(q, (k, v), heads, mask_of(bias, key_mask), scale)
        x = normed(x, hidden, first[6:])
        if image_kv is not None:
            q, images = F.linear(x, cross[0], cross[1]), image_kv.chunk(2, 2)
            x = normed(attend(q, images, heads, mask_of(None, image_mask), scale), x, cross[2:])
        return normed(activate(F.linear(x, last[0], last[1]), activation), x, last[2:])

    return call


PEERS = (
    Peer("SDPA", "self_attention", self_attention),
    Peer("SDPA", "qformer_layer", qformer_layer),
)
