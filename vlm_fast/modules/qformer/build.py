"""Build the layers of a Q-Former, with the child names of BLIP-2's checkpoints."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlm_fast.modules.parameter_access.activation import activation_module
from vlm_fast.modules.qformer.encoder import QFormerLayer


def build_layers(
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    intermediate_size: int,
    encoder_hidden_size: int,
    cross_attention_frequency: int,
    hidden_act: str,
    hidden_dropout_prob: float,
    attention_probs_dropout_prob: float,
    layer_norm_eps: float,
    use_qformer_text_input: bool,
    factory: dict[str, Any],
) -> list[nn.Module]:
    """The layers of a `QFormer`, which explains the arguments. ``factory``: device and dtype."""

    def output(inputs: int) -> nn.Module:
        return NamedChildren(
            dense=nn.Linear(inputs, hidden_size, **factory),
            LayerNorm=nn.LayerNorm(hidden_size, eps=layer_norm_eps, **factory),
            dropout=nn.Dropout(hidden_dropout_prob),
        )

    def intermediate() -> nn.Module:
        return NamedChildren(
            dense=nn.Linear(hidden_size, intermediate_size, **factory),
            intermediate_act_fn=activation_module(hidden_act),
        )

    def attention(keys_from: int) -> nn.Module:
        projections = NamedChildren(
            query=nn.Linear(hidden_size, hidden_size, **factory),
            key=nn.Linear(keys_from, hidden_size, **factory),
            value=nn.Linear(keys_from, hidden_size, **factory),
        )
        projections.num_attention_heads = num_attention_heads  # type: ignore[assignment]
        projections.scaling = (hidden_size // num_attention_heads) ** -0.5
        projections.attention_dropout = attention_probs_dropout_prob  # type: ignore
        return NamedChildren(attention=projections, output=output(hidden_size))

    layers: list[nn.Module] = []
    for i in range(num_hidden_layers):
        children = dict(attention=attention(hidden_size))
        if i % cross_attention_frequency == 0:
            children["crossattention"] = attention(encoder_hidden_size)
        if use_qformer_text_input:
            children |= dict(intermediate=intermediate(), output=output(intermediate_size))
        children |= dict(intermediate_query=intermediate(), output_query=output(intermediate_size))
        layers.append(QFormerLayer(**children))
    return layers


class NamedChildren(nn.Module):
    """A module without a forward, whose children have the names of the checkpoints."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
