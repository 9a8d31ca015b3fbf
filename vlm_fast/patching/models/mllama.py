"""Patch of Llama 3.2 Vision: cross-attention layers over image tiles, and their mask.

The model's own ``forward`` runs without its image mask, from which it would make a dense mask of
the whole context for every generated token. The layers get a `MediaMask` of the new tokens. A
layer whose children must be called (LoRA, quantization, hooks) runs its original forward, with the
dense mask that it expects.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.fallback import record_fallback
from vlm_fast.modules.gated_residual import gated_residuals, rms_norm, why_not_gated_mlp
from vlm_fast.modules.parameter_access.activation import activation_name
from vlm_fast.modules.parameter_access.attention_settings import attention_scale
from vlm_fast.modules.parameter_access.module_calls import MAPS_REQUESTED, collects_attentions
from vlm_fast.modules.parameter_access.module_tree import (
    why_not_direct_tree,
    why_tree_dtypes_differ,
)
from vlm_fast.modules.parameter_access.module_view import view_of
from vlm_fast.modules.parameter_access.original_code import names_used_by
from vlm_fast.ops.argument_errors import wrong_value
from vlm_fast.patching.class_swap import is_class
from vlm_fast.patching.media_masks import (
    MediaMask,
    ProvidesMediaMask,
    ReadsMediaMask,
    why_not_media_mask,
)
from vlm_fast.patching.models.mllama_inputs import (
    cached_key_values,
    dense_masks,
    mask_of_new_tokens,
)
from vlm_fast.patching.patched_module import why_no_extra_arguments_for


class FusedMllamaModel(ProvidesMediaMask):
    """Replaces the forward of MllamaModel: passes its cross-attention layers a `MediaMask`."""

    language_model: Any

    def forward(
        self,
        *,
        input_ids: Any = None,
        inputs_embeds: Any = None,
        cross_attention_mask: Any = None,
        cache: Any = None,
        cache_position: Any = None,
        **forwarded: Any,
    ) -> Any:
        mask, options = cross_attention_mask, forwarded
        text = inputs_embeds if input_ids is None else input_ids
        if mask is not None and text is not None and self.why_not_media_mask(mask) is None:
            mask = mask_of_new_tokens(mask, text, cache, cache_position)
            sets = MediaMask.from_bool(mask.flatten(2) == 1, text.shape[:2])
            mask, options = None, options | dict(media_mask=tuple(sets))
        return self.call_base(
            "forward", input_ids=input_ids, inputs_embeds=inputs_embeds, cross_attention_mask=mask,
            cache=cache, cache_position=cache_position, **options,
        )  # fmt: skip

    def why_not_media_mask(self, mask: Any) -> str | None:
        for i, layer in enumerate(self.language_model.layers):
            if hasattr(layer, "cross_attn"):
                reason = why_no_extra_arguments_for(layer, FusedMllamaLayer)
                if reason is not None:
                    return f"layer {i}: {reason}"
        return why_not_media_mask(mask, 4)


class FusedMllamaLayer(ReadsMediaMask):
    """Replaces the forward of MllamaCrossAttentionDecoderLayer.

    ``media_mask`` comes from `FusedMllamaModel`. The settings say in which form keys are cached.
    """

    cross_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any
    cross_attn_attn_gate: Any
    cross_attn_mlp_gate: Any

    required_attributes: ClassVar[tuple[str, ...]] = (
        *(f"cross_attn.{name}" for name in (
            "num_heads", "num_key_value_heads", "head_dim", "layer_idx", "dropout", "q_proj",
            "k_proj", "v_proj", "o_proj", "q_norm.variance_epsilon", "k_norm.variance_epsilon",
        )),
        "input_layernorm.variance_epsilon", "post_attention_layernorm.variance_epsilon",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn",
    )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        cross_attention_states: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        attention_mask: Any = None,
        full_text_row_masked_out_mask: Any = None,
        position_ids: Any = None,
        cache: Any = None,
        use_cache: bool | None = False,
        cache_position: Any = None,
        position_embeddings: Any = None,
        output_attentions: bool | None = False,
        *,
        media_mask: tuple[Tensor, int] | None = None,
        **kwargs: Any,
    ) -> Any:
        sets = None if media_mask is None else MediaMask(*media_mask)
        x, states, mask = hidden_states, cross_attention_states, cross_attention_mask
        rows = full_text_row_masked_out_mask
        reason = MAPS_REQUESTED if collects_attentions() or output_attentions else self.why_not()
        this: Any = self
        reason = reason or why_tree_dtypes_differ(this, x, states)
        if sets is None and mask is None and x.shape[1] > 1:
            reason = "without a mask its attention may be causal"
        if reason is not None:
            record_fallback(type(self).__name__, reason)
            if sets is not None:
                mask, rows = dense_masks(sets, self._keys(x, states, cache), x.dtype)
            return self.call_base(
                "forward", hidden_states=x, cross_attention_states=states,
                cross_attention_mask=mask, attention_mask=attention_mask,
                full_text_row_masked_out_mask=rows, position_ids=position_ids, cache=cache,
                use_cache=use_cache, cache_position=cache_position,
                position_embeddings=position_embeddings, output_attentions=output_attentions,
                **kwargs,
            )  # fmt: skip
        attn, view = self.cross_attn, view_of(self)
        q = attn.q_proj(rms_norm(x, view.input_layernorm)).unflatten(2, (attn.num_heads, -1))
        # After q, as in the original: its backward needs most memory and must run first.
        k, v = self._key_values(x, states, cache, cache_position)
        attended, row_mask = self._attend(q.transpose(1, 2), k, v, sets, mask, rows)
        attended = attn.o_proj(attended.transpose(1, 2).flatten(2))
        x = gated_residuals(
            x, attended, view.cross_attn_attn_gate, view.post_attention_layernorm,
            view.mlp, view.cross_attn_mlp_gate, mlp_rows=row_mask,
        )  # fmt: skip
        if "output_attentions" not in self.argument_names["forward"].known:
            return x
        return (x, cache) if use_cache else (x,)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, sets: MediaMask | None, mask: Tensor | None,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The attention output, and for which tokens the MLP is added.

        The latter is bool, or the factors that the caller gave, or None for all tokens.
        """
        attn = self.cross_attn
        if mask is not None and sets is None:  # a dense mask from the caller
            q = rms_norm(q, attn.q_norm)
            attended = ops.cross_attention(
                q, k, v, bias=mask[..., : k.shape[2]], scale=attention_scale(attn)
            )
            return attended, None if rows is None else rows[:, 0, :, 0]
        row_mask = None if sets is None else sets.bits != 0
        if sets is None:  # a single token, which attends to all tiles
            sets = MediaMask(q.new_zeros((q.shape[0], q.shape[2])).long(), 1)
        if k.shape[2] % sets.media:
            wanted = f"a multiple of the {sets.media} tiles of cross_attention_mask"
            raise wrong_value("patch(Mllama)", "image tokens", k.shape[2], wanted)
        attended = ops.media_cross_attention(
            q, k, v, sets.bits, attn.q_norm.weight, eps=attn.q_norm.variance_epsilon,
            attend="listed", unattended="everything", scale=attention_scale(attn),
            tokens_per_media=k.shape[2] // sets.media,
        )  # fmt: skip
        return attended, row_mask

    def _key_values(
        self, hidden: Tensor, states: Tensor | None, cache: Any, cache_position: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``(batch, kv_heads, image tokens, d)``, projected or from the cache."""
        attn, (cached,) = self.cross_attn, self.patch_spec.settings
        if states is None:
            if cache is None or cache.get_seq_length(attn.layer_idx) == 0:
                raise ValueError(
                    "vlm_fast.patch(Mllama): cross_attention_states is None and the cache has no "
                    "keys of images, expected one of them"
                )
            k, v = cached_key_values(cache, attn.layer_idx)
            return (rms_norm(k, attn.k_norm) if cached == "before the norm" else k), v
        k, v = (
            linear(states).reshape(hidden.shape[0], -1, attn.num_key_value_heads, attn.head_dim)
            for linear in (attn.k_proj, attn.v_proj)
        )
        if cached == "before the norm":
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        else:
            k, v = rms_norm(k, attn.k_norm).transpose(1, 2), v.transpose(1, 2)
        if cached == "for each head" and cache is not None:
            groups = attn.num_heads // attn.num_key_value_heads
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        if cache is not None:
            options = [] if cache_position is None else [{"cache_position": cache_position}]
            k, v = cache.update(k, v, attn.layer_idx, *options)
        return (rms_norm(k, attn.k_norm) if cached == "before the norm" else k), v

    def _keys(self, hidden: Tensor, states: Tensor | None, cache: Any) -> int:
        """The number of image tokens, cached and new."""
        cached = 0 if cache is None else cache.get_seq_length(self.cross_attn.layer_idx)
        new = 0 if states is None else states.shape[:-1].numel() // hidden.shape[0]
        return int(cached) + new

    def why_not(self) -> str | None:
        if self.cross_attn.training and self.cross_attn.dropout > 0:
            return "attention has dropout"
        reason = why_not_direct_tree(self, biases=False)  # type: ignore[arg-type]
        return reason or why_not_gated_mlp(view_of(self).mlp)


def recognise_model(module: nn.Module, **options: Any) -> tuple[()] | str | None:
    """Empty settings, a reason not to patch, or None for another class."""
    if not is_class(module, "mllama", "MllamaModel"):
        return None
    model: Any = module
    if "_gradient_checkpointing_func" in names_used_by(type(model.language_model).forward):
        return "its text model does not pass unknown arguments to checkpointed layers"
    return ()


def recognise_layer(module: nn.Module, **options: Any) -> tuple[str] | str | None:
    """In which form a cross-attention layer caches its keys, a reason not to patch, or None."""
    if not is_class(module, "mllama", "MllamaCrossAttentionDecoderLayer"):
        return None
    layer: Any = module
    if activation_name(layer.mlp.act_fn) is None:
        return f"{type(layer.mlp.act_fn).__name__} is not an activation the kernels know"
    attention_scale(layer.cross_attn)
    kind = type(layer.cross_attn)
    if "repeat_kv" not in names_used_by(kind.forward):
        return ("as they are read",)
    sdpa = kind.__name__ == "MllamaTextCrossSdpaAttention"
    return ("before the norm",) if sdpa else ("for each head",)
