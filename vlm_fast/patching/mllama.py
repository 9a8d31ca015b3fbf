"""Llama 3.2 Vision: cross-attention layers over image tiles, and the mask prepared for them.

The model's own ``forward`` runs, without its mask of text by image tokens, which it would make anew
for the whole context at every generated token; the layers get a set of tiles for each new token. A
layer with a child that is not plain (LoRA, quantisation, hooks) runs its own forward, with the mask
it expects.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.modules.activation import activation_of
from vlm_fast.modules.gated_layer import gated_residuals, rms_norm, why_not_gated
from vlm_fast.modules.plain_tree import wants_attentions, why_not_dtypes_of_tree, why_not_plain_tree
from vlm_fast.patching.class_swap import is_class, why_not_handed
from vlm_fast.patching.media_sets import GivenSets, GivesSets, MediaSets, why_not_sets
from vlm_fast.policy import fell_back
from vlm_fast.refusal import wrong_value

ATTENTIONS = "attention maps were asked for, which no kernel forms"


class FusedMllamaModel(GivesSets):
    """A model that tells its cross-attention layers the tiles each token sees."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(self.patch.base.forward).bind(self, *args, **kwargs)
        given = bound.arguments
        mask: Any = given.get("cross_attention_mask")
        text: Any = given.get("input_ids")
        text = given.get("inputs_embeds") if text is None else text
        if mask is None or text is None or self.why_not_sets(mask) is not None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        past = given.get("past_key_values")
        first = past.get_seq_length() if past is not None else 0
        if isinstance(first, int):
            last = first + text.shape[1]
            if mask.shape[1] < last:
                wanted = f"(batch, {last} or more, images, tiles): {first} tokens cached, then more"
                raise wrong_value("patch(Mllama)", "cross_attention_mask", mask, wanted)
            mask = mask[:, first:last]
        else:
            mask = mask[:, torch.arange(text.shape[1], device=mask.device) + first]
        given["cross_attention_mask"] = None
        options = given.pop("kwargs", {})
        del given["self"]
        media_sets = MediaSets.of(mask.flatten(2) == 1, text.shape[:2])
        options["media_sets"] = tuple(media_sets)
        return super().forward(**given, **options)  # type: ignore[misc]

    def why_not_sets(self, mask: Any) -> str | None:
        layers: Any = self.language_model.layers  # type: ignore[attr-defined]
        for i, layer in enumerate(layers):
            if hasattr(layer, "cross_attn"):
                reason = why_not_handed(layer, FusedMllamaLayer)
                if reason is not None:
                    return f"layer {i}: {reason}"
        return why_not_sets(mask, 4)


class FusedMllamaLayer(GivenSets):
    """One gated cross-attention layer; ``media_sets`` comes from `FusedMllamaModel`."""

    cross_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any
    cross_attn_attn_gate: Any
    cross_attn_mlp_gate: Any

    def forward(
        self,
        hidden_states: Tensor,
        cross_attention_states: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        attention_mask: Any = None,
        full_text_row_masked_out_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        *,
        media_sets: tuple[Tensor, int] | None = None,
        **kwargs: Any,
    ) -> Any:
        sets = None if media_sets is None else MediaSets(*media_sets)
        reason = ATTENTIONS if wants_attentions() or kwargs.get("output_attentions") else None
        if cross_attention_mask is not None:
            reason = "a mask of text by image tokens was given, not the tiles each token sees"
        reason = reason or self.why_not()
        this: Any = self
        reason = reason or why_not_dtypes_of_tree(this, hidden_states, cross_attention_states)
        if reason is not None:
            fell_back(type(self).__name__, reason)
            if sets is not None:
                keys = self._keys(hidden_states, cross_attention_states, past_key_values)
                cross_attention_mask, full_text_row_masked_out_mask = _as_prepared(
                    sets, keys, hidden_states.dtype
                )
            return super().forward(  # type: ignore[misc]
                hidden_states, cross_attention_states, cross_attention_mask, attention_mask,
                full_text_row_masked_out_mask, position_ids, past_key_values, use_cache,
                position_embeddings, **kwargs,
            )  # fmt: skip
        attn, norm = self.cross_attn, self.input_layernorm
        normed = rms_norm(hidden_states, norm)
        q = attn.q_proj(normed).unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
        # After q, as in the layer itself: its backward takes most, before q has gradients.
        k, v = self._key_values(hidden_states, cross_attention_states, past_key_values)
        if sets is None:  # every token sees all
            sets = MediaSets(hidden_states.new_zeros(hidden_states.shape[:2]).long(), 1)
            row_mask = None
        else:
            row_mask = sets.bits != 0
        if k.shape[2] % sets.media:
            wanted = f"a multiple of the {sets.media} tiles of cross_attention_mask"
            raise wrong_value("patch(Mllama)", "image tokens", k.shape[2], wanted)
        attended = ops.media_cross_attention(
            q, k, v, sets.bits, attn.q_norm.weight, eps=attn.q_norm.variance_epsilon,
            attend="listed", unattended="everything", scale=attn.scaling,
            tokens_per_media=k.shape[2] // sets.media,
        )  # fmt: skip
        attended = attn.o_proj(attended.transpose(1, 2).flatten(2))
        return gated_residuals(
            hidden_states, attended, self.cross_attn_attn_gate, self.post_attention_layernorm,
            self.mlp, self.cross_attn_mlp_gate, mlp_rows=row_mask,
        )  # fmt: skip

    def _key_values(
        self, hidden: Tensor, states: Tensor | None, past_key_values: Any
    ) -> tuple[Tensor, Tensor]:
        """``(batch, kv_heads, image tokens, d)``, from the states or the cache."""
        attn = self.cross_attn
        if states is None:
            if past_key_values is None or past_key_values.get_seq_length(attn.layer_idx) == 0:
                raise ValueError(
                    "vlm_fast.patch(Mllama): cross_attention_states is None and the cache has no "
                    "keys of images, expected one of them"
                )
            cached = past_key_values.layers[attn.layer_idx]
            return cached.keys, cached.values
        k, v = (
            linear(states).reshape(hidden.shape[0], -1, attn.num_key_value_heads, attn.head_dim)
            for linear in (attn.k_proj, attn.v_proj)
        )
        k, v = rms_norm(k, attn.k_norm).transpose(1, 2), v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, attn.layer_idx)
        return k, v

    def _keys(self, hidden: Tensor, states: Tensor | None, past_key_values: Any) -> int:
        """How many image tokens there are, cached and new."""
        attn = self.cross_attn
        cached = 0 if past_key_values is None else past_key_values.get_seq_length(attn.layer_idx)
        new = 0 if states is None else states.shape[:-1].numel() // hidden.shape[0]
        return int(cached) + new

    def why_not(self) -> str | None:
        if self.cross_attn.training and self.cross_attn.dropout > 0:
            return "attention has dropout"
        reason = why_not_plain_tree(self, biases=False)  # type: ignore[arg-type]
        return reason or why_not_gated(self)


def _as_prepared(sets: MediaSets, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The masks as the model would have prepared them; a token without tiles sees all."""
    some = (sets.bits != 0)[:, None, :, None]
    return sets.dense_mask(keys, dtype) * some, some.to(dtype)


def recognise_model(module: nn.Module, **options: Any) -> tuple[()] | str | None:
    """A recipe, a reason against, or None for another class."""
    return () if is_class(module, "mllama", "MllamaModel") else None


def recognise_layer(module: nn.Module, **options: Any) -> tuple[()] | str | None:
    """The same for a cross-attention layer."""
    if not is_class(module, "mllama", "MllamaCrossAttentionDecoderLayer"):
        return None
    layer: Any = module
    if activation_of(layer.mlp.act_fn) is None:
        return f"{type(layer.mlp.act_fn).__name__} is not an activation the kernels know"
    return ()
