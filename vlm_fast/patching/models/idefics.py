"""Patch of IDEFICS: gated cross-attention layers, and a cache of image keys for generation.

The model's own ``forward`` runs with the image mask of a single token, so that its dense mask stays
small. The layers get a `MediaMask` instead. transformers projects all images again for every
generated token in every layer; here their keys and values are cached (`image_kv_cache`).
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.fallback import record_fallback
from vlm_fast.modules.gated_residual import gated_residuals, rms_norm, why_not_gated_mlp
from vlm_fast.modules.parameter_access.activation import activation_name
from vlm_fast.modules.parameter_access.attention_settings import attention_scale
from vlm_fast.modules.parameter_access.module_calls import MAPS_REQUESTED
from vlm_fast.modules.parameter_access.module_tree import (
    why_not_direct_tree,
    why_tree_dtypes_differ,
)
from vlm_fast.modules.parameter_access.module_view import view_of
from vlm_fast.ops.argument_errors import wrong_value
from vlm_fast.patching.class_swap import is_class
from vlm_fast.patching.image_kv_cache import ImageKeyValueCache
from vlm_fast.patching.media_masks import (
    MediaMask,
    ProvidesMediaMask,
    ReadsMediaMask,
    why_not_media_mask,
)
from vlm_fast.patching.patched_module import why_no_extra_arguments_for


class FusedIdeficsModel(ProvidesMediaMask):
    """Replaces the forward of IdeficsModel: passes its gated layers a `MediaMask`."""

    gated_cross_attn_layers: Any

    def forward(
        self,
        *,
        input_ids: Any = None,
        inputs_embeds: Any = None,
        image_attention_mask: Any = None,
        cache: Any = None,
        **forwarded: Any,
    ) -> Any:
        mask, options = image_attention_mask, forwarded
        if self.why_not_media_mask(mask) is None:
            text = inputs_embeds if input_ids is None else input_ids
            rows = mask.shape[:2] if text is None else text.shape[:2]
            tokens = 0 if text is None else text.shape[1]
            options |= dict(
                media_mask=tuple(MediaMask.from_bool(mask.bool(), rows)),
                image_kv_cache=ImageKeyValueCache.for_generation(self, cache, tokens),
            )
            mask = mask[:, :1]
        return self.call_base(
            "forward", input_ids=input_ids, inputs_embeds=inputs_embeds, image_attention_mask=mask,
            cache=cache, **options,
        )  # fmt: skip

    def why_not_media_mask(self, mask: Any) -> str | None:
        for i, layer in enumerate(self.gated_cross_attn_layers):
            reason = why_no_extra_arguments_for(layer, FusedIdeficsLayer)
            if reason is not None:
                return f"gated layer {i}: {reason}"
        return why_not_media_mask(mask, 3)


class FusedIdeficsLayer(ReadsMediaMask):
    """Replaces the forward of IdeficsGatedCrossAttentionLayer.

    ``media_mask`` and ``image_kv_cache`` come from `FusedIdeficsModel`.
    """

    cross_attn: Any
    mlp: Any
    config: Any
    training: bool
    input_layernorm: Any
    post_attention_layernorm: Any
    alpha_cross_attn: Any
    alpha_dense: Any

    required_attributes: ClassVar[tuple[str, ...]] = (
        *(f"cross_attn.{name}" for name in (
            "num_heads", "head_dim", "dropout", "qk_layer_norms", "q_proj", "k_proj", "v_proj",
            "o_proj",
        )),
        "input_layernorm.variance_epsilon", "post_attention_layernorm.variance_epsilon",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn",
    )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        image_hidden_states: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        cross_attention_gate: Tensor | None = None,
        cache: Any = None,
        output_attentions: bool | None = False,
        use_cache: bool | None = False,
        *,
        media_mask: tuple[Tensor, int] | None = None,
        image_kv_cache: ImageKeyValueCache | None = None,
        **kwargs: Any,
    ) -> Any:
        sets = None if media_mask is None else MediaMask(*media_mask)
        x, images = hidden_states, image_hidden_states
        if images is not None and sets is not None:
            _check(sets, x, images, image_attention_mask)
        reason = self.why_not() or why_tree_dtypes_differ(self, x, images)  # type: ignore[arg-type]
        if images is None or cross_attention_gate is None or cache is not None:
            reason = "an argument is not as the model gives it"
        elif output_attentions:
            reason = MAPS_REQUESTED
        elif sets is None and image_attention_mask is None and x.shape[1] > 1:
            reason = "without a mask its attention may be causal"
        if reason is not None:
            record_fallback(type(self).__name__, reason)
            if images is not None and sets is not None:
                image_attention_mask = sets.dense_mask(images.shape[1], images.dtype)
                cross_attention_gate = (sets.bits != 0).to(images.dtype)
            return self.call_base(
                "forward", hidden_states=x, attention_mask=attention_mask,
                image_hidden_states=images, image_attention_mask=image_attention_mask,
                cross_attention_gate=cross_attention_gate, cache=cache,
                output_attentions=output_attentions, use_cache=use_cache, **kwargs,
            )  # fmt: skip
        assert images is not None and cross_attention_gate is not None
        attn, view = self.cross_attn, view_of(self)
        q = attn.q_proj(rms_norm(x, view.input_layernorm)).unflatten(2, (attn.num_heads, -1))
        attended, row_mask = self._attend(
            q.transpose(1, 2), images, image_attention_mask, cross_attention_gate, sets,
            image_kv_cache,
        )  # fmt: skip
        attended = attn.o_proj(attended.transpose(1, 2).flatten(2))
        x = gated_residuals(
            x, attended, view.alpha_cross_attn, view.post_attention_layernorm, view.mlp,
            view.alpha_dense, attention_rows=row_mask,
        )  # fmt: skip
        if "output_attentions" not in self.argument_names["forward"].known:
            return x
        return (x, None) if use_cache else (x,)  # it has no text keys and values to cache

    def _attend(
        self, q: Tensor, images: Tensor, mask: Tensor | None, gate: Tensor,
        sets: MediaMask | None, image_kv_cache: ImageKeyValueCache | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The attention output, and the tokens for which it is added (None: all)."""
        attn = self.cross_attn
        if image_kv_cache is None:
            k, v = self._key_values(images)
        else:
            k, v = image_kv_cache.get_or_project(self, images, self._key_values)
        norm = attn.q_layer_norm if attn.qk_layer_norms else None
        if sets is None:  # called without the model, with a dense mask
            q = q if norm is None else rms_norm(q, norm)
            return ops.cross_attention(q, k, v, bias=mask, scale=attention_scale(attn)), gate != 0
        # The op gives zeros for a token without images.
        return ops.media_cross_attention(
            q, k, v, sets.bits, None if norm is None else norm.weight,
            attend="listed", tokens_per_media=k.shape[2] // sets.media,
            scale=attention_scale(attn), eps=1e-6 if norm is None else norm.variance_epsilon,
        ), None  # fmt: skip

    def _key_values(self, images: Tensor) -> tuple[Tensor, Tensor]:
        attn = self.cross_attn
        k, v = (
            linear(images).unflatten(2, (attn.num_heads, -1))
            for linear in (attn.k_proj, attn.v_proj)
        )
        if attn.qk_layer_norms:
            k = rms_norm(k, attn.k_layer_norm)
        return k.transpose(1, 2), v.transpose(1, 2)

    def why_not(self) -> str | None:
        if self.training and (self.cross_attn.dropout > 0 or self.config > 0):
            return "it has dropout"
        # Cross-attention has no rotary embedding.
        reason = why_not_direct_tree(self, biases=False, unread="rotary_emb")  # type: ignore[arg-type]
        return reason or why_not_gated_mlp(view_of(self).mlp)


def _check(sets: MediaMask, x: Tensor, images: Tensor, mask: Tensor | None) -> None:
    owner = "patch(Idefics)"
    if sets.bits.shape != x.shape[:2]:
        wanted = f"({x.shape[0]}, {x.shape[1]}, images), a row for each token"
        raise wrong_value(owner, "image_attention_mask", sets.seen, wanted)
    if mask is not None and mask.shape[-1] != images.shape[1]:
        wanted = f"as many images as image_hidden_states, {images.shape[1]} tokens, has"
        raise wrong_value(owner, "image_attention_mask", sets.seen, wanted)


def recognise_model(module: nn.Module, **options: Any) -> tuple[()] | str | None:
    """Empty settings, a reason not to patch, or None for another class."""
    if not is_class(module, "idefics", "IdeficsModel"):
        return None
    parameters = inspect.signature(type(module).forward).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        return "its forward does not pass unknown arguments to its layers"
    return ()


def recognise_layer(module: nn.Module, **options: Any) -> tuple[()] | str | None:
    """Empty settings for a gated cross-attention layer, a reason not to patch, or None."""
    if not is_class(module, "idefics", "IdeficsGatedCrossAttentionLayer"):
        return None
    layer: Any = module
    if activation_name(layer.mlp.act_fn) is None:
        return f"{type(layer.mlp.act_fn).__name__} is not an activation the kernels know"
    attention_scale(layer.cross_attn)
    return ()
