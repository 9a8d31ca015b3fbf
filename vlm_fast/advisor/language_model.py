"""Cost of visual tokens in the language model: prefill, keys and values, weights."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.advisor.cost_counter import CostCounter
from vlm_fast.advisor.model_shapes import LanguageModel, VisionTower

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch, with grouped queries if there are fewer key heads."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


class LanguageLayer(nn.Module):
    """A decoder layer with the matrices, norms and attention of Llama or OPT, to time and count.

    Weights are random and positions are not rotated.

    Args:
        language: shapes.
        attention: function of q ``(batch, heads, tokens, d)`` and k, v ``(batch, kv_heads, tokens,
            d)``.
    """

    def __init__(self, language: LanguageModel, attention: Attention = causal) -> None:
        super().__init__()
        hidden, d = language.hidden, language.head_dim
        self.shape, self.attention = language, attention
        self.norms = nn.ModuleList(nn.LayerNorm(hidden, bias=False) for _ in range(2))
        self.query = nn.Linear(hidden, language.heads * d, bias=False)
        self.key, self.value = (
            nn.Linear(hidden, language.kv_heads * d, bias=False) for _ in range(2)
        )
        self.out = nn.Linear(language.heads * d, hidden, bias=False)
        self.up = nn.Linear(hidden, language.intermediate, bias=False)
        self.gate = nn.Linear(hidden, language.intermediate, bias=False) if language.gated else None
        self.down = nn.Linear(language.intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, tokens, hidden)`` to the same shape."""
        d = self.shape.head_dim
        normed = self.norms[0](x)
        q, k, v = (
            linear(normed).unflatten(2, (-1, d)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        x = x + self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))
        normed = self.norms[1](x)
        up = self.up(normed)
        inner = F.relu(up) if self.gate is None else F.silu(self.gate(normed)) * up
        return x + self.down(inner)


def prefill_flops(language: LanguageModel, tokens: int) -> int:
    """FLOPs of all layers for one sequence of ``tokens`` tokens.

    Matrix products are counted by torch's formulas, attention by the cost model of
    ``ops.cross_attention`` with all pairs, though half of them are masked. The embedding and the
    head, which processes one token, are not counted.
    """
    return step_flops(language, tokens, backward=False)


@functools.lru_cache(maxsize=1024)
def step_flops(language: LanguageModel, tokens: int, backward: bool) -> int:
    """`prefill_flops`, plus the gradient of the input through frozen layers if ``backward``."""
    if tokens == 0:
        return 0
    with torch.device("meta"), torch.set_grad_enabled(backward):
        layer = LanguageLayer(language, ops.cross_attention).requires_grad_(False)
        x = torch.empty(1, tokens, language.hidden, requires_grad=backward)
        with CostCounter() as counter:
            y = layer(x)
            counter.backward = True
            if backward:
                y.backward(torch.empty_like(y))
    return language.layers * (counter.cost.forward_flops + counter.cost.backward_flops)


def attention_flops(language: LanguageModel, tokens: int) -> int:
    """The part of `prefill_flops` that grows with the square of the number of tokens."""
    shape = (1, language.heads, tokens, language.head_dim)
    with torch.device("meta"):
        q = torch.empty(shape)
        return language.layers * ops.cross_attention.cost_of(q, q, q).forward_flops


def key_value_bytes(language: LanguageModel, dtype: torch.dtype) -> int:
    """Bytes that one token takes in the cache: keys and values of all layers."""
    return 2 * language.layers * language.kv_heads * language.head_dim * dtype.itemsize


@functools.lru_cache(maxsize=64)
def language_parameters(language: LanguageModel) -> int:
    """Number of parameters of the layers, the embedding and the head."""
    with torch.device("meta"):
        layer = sum(p.numel() for p in LanguageLayer(language).parameters())
    embeddings = language.vocabulary * language.hidden * (1 if language.tied else 2)
    return language.layers * layer + embeddings


@functools.lru_cache(maxsize=64)
def tower_parameters(tower: VisionTower) -> int:
    """Number of parameters of the layers of a plain vision transformer of this shape."""
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(tower.hidden, 1, tower.intermediate)
    return tower.layers * sum(p.numel() for p in layer.parameters())
