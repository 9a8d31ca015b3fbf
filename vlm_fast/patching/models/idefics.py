"""IDEFICS: gated cross-attention layers, with keys and values of images kept for a generation.

The model's own ``forward`` runs with a mask of one token, from which it makes that of text by image
tokens; the layers get a set of images for each token instead. transformers projects all images anew
for every generated token in every layer; here that is kept beside the cache of the generation.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.fallback import fell_back
from vlm_fast.modules.gated_residual import gated_residuals, rms_norm, why_not_gated
from vlm_fast.modules.parameter_access.activation import activation_of
from vlm_fast.modules.parameter_access.attention_settings import scale_of
from vlm_fast.modules.parameter_access.module_tree import why_not_dtypes_of_tree, why_not_plain_tree
from vlm_fast.ops.argument_errors import wrong_value
from vlm_fast.patching.class_swap import is_class, why_not_handed
from vlm_fast.patching.image_kv_cache import ImageKeys
from vlm_fast.patching.media_masks import GivenSets, GivesSets, MediaSets, why_not_sets


class FusedIdeficsModel(GivesSets):
    """A model that tells its gated layers the images each token sees."""

    gated_cross_attn_layers: Any

    def forward(
        self,
        *,
        input_ids: Any = None,
        inputs_embeds: Any = None,
        image_attention_mask: Any = None,
        cache: Any = None,
        **passed_on: Any,
    ) -> Any:
        mask, options = image_attention_mask, passed_on
        if self.why_not_sets(mask) is None:
            text = inputs_embeds if input_ids is None else input_ids
            rows = mask.shape[:2] if text is None else text.shape[:2]
            tokens = 0 if text is None else text.shape[1]
            options |= dict(
                media_sets=tuple(MediaSets.of(mask.bool(), rows)),
                image_keys=ImageKeys.of_cache(self, cache, tokens),
            )
            mask = mask[:, :1]
        return self.call_base(
            "forward", input_ids=input_ids, inputs_embeds=inputs_embeds, image_attention_mask=mask,
            cache=cache, **options,
        )  # fmt: skip

    def why_not_sets(self, mask: Any) -> str | None:
        for i, layer in enumerate(self.gated_cross_attn_layers):
            reason = why_not_handed(layer, FusedIdeficsLayer)
            if reason is not None:
                return f"gated layer {i}: {reason}"
        return why_not_sets(mask, 3)


class FusedIdeficsLayer(GivenSets):
    """One gated cross-attention layer; ``media_sets`` comes from `FusedIdeficsModel`."""

    cross_attn: Any
    mlp: Any
    config: Any
    training: bool
    input_layernorm: Any
    post_attention_layernorm: Any
    alpha_cross_attn: Any
    alpha_dense: Any

    reads: ClassVar[tuple[str, ...]] = (
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
        media_sets: tuple[Tensor, int] | None = None,
        image_keys: ImageKeys | None = None,
        **kwargs: Any,
    ) -> Any:
        sets = None if media_sets is None else MediaSets(*media_sets)
        x, images = hidden_states, image_hidden_states
        if images is not None and sets is not None:
            _check(sets, x, images, image_attention_mask)
        reason = self.why_not() or why_not_dtypes_of_tree(self, x, images)  # type: ignore[arg-type]
        if images is None or cross_attention_gate is None or cache is not None:
            reason = "an argument is not as the model gives it"
        elif output_attentions:
            reason = "attention maps were asked for, which no kernel forms"
        elif sets is None and image_attention_mask is None and x.shape[1] > 1:
            reason = "without a mask its attention may be causal"
        if reason is not None:
            fell_back(type(self).__name__, reason)
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
        attn = self.cross_attn
        q = attn.q_proj(rms_norm(x, self.input_layernorm)).unflatten(2, (attn.num_heads, -1))
        attended, row_mask = self._attend(
            q.transpose(1, 2), images, image_attention_mask, cross_attention_gate, sets,
            image_keys,
        )  # fmt: skip
        attended = attn.o_proj(attended.transpose(1, 2).flatten(2))
        x = gated_residuals(
            x, attended, self.alpha_cross_attn, self.post_attention_layernorm, self.mlp,
            self.alpha_dense, attention_rows=row_mask,
        )  # fmt: skip
        if "output_attentions" not in self.names["forward"].known:
            return x
        return (x, None) if use_cache else (x,)  # it has no keys and values of its own to give

    def _attend(
        self, q: Tensor, images: Tensor, mask: Tensor | None, gate: Tensor,
        sets: MediaSets | None, image_keys: ImageKeys | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """What is seen of the images, and which rows to keep of it (None: all)."""
        attn = self.cross_attn
        if image_keys is None:
            k, v = self._key_values(images)
        else:
            k, v = image_keys.of_layer(self, images, self._key_values)
        norm = attn.q_layer_norm if attn.qk_layer_norms else None
        if sets is None:  # a layer on its own, given a mask of text by image tokens
            q = q if norm is None else rms_norm(q, norm)
            return ops.cross_attention(q, k, v, bias=mask, scale=scale_of(attn)), gate != 0
        # A token that sees no image gets zeros already.
        return ops.media_cross_attention(
            q, k, v, sets.bits, None if norm is None else norm.weight,
            attend="listed", tokens_per_media=k.shape[2] // sets.media,
            scale=scale_of(attn), eps=1e-6 if norm is None else norm.variance_epsilon,
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
        # Cross-attention rotates nothing.
        reason = why_not_plain_tree(self, biases=False, unread="rotary_emb")  # type: ignore[arg-type]
        return reason or why_not_gated(self)


def _check(sets: MediaSets, x: Tensor, images: Tensor, mask: Tensor | None) -> None:
    owner = "patch(Idefics)"
    if sets.bits.shape != x.shape[:2]:
        wanted = f"({x.shape[0]}, {x.shape[1]}, images), a row for each token"
        raise wrong_value(owner, "image_attention_mask", sets.seen, wanted)
    if mask is not None and mask.shape[-1] != images.shape[1]:
        wanted = f"as many images as image_hidden_states, {images.shape[1]} tokens, has"
        raise wrong_value(owner, "image_attention_mask", sets.seen, wanted)


def recognise_model(module: nn.Module, **options: Any) -> tuple[()] | str | None:
    """A recipe, a reason against, or None for another class."""
    if not is_class(module, "idefics", "IdeficsModel"):
        return None
    parameters = inspect.signature(type(module).forward).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        return "its forward hands its layers nothing that it does not know itself"
    return ()


def recognise_layer(module: nn.Module, **options: Any) -> tuple[()] | str | None:
    """The same for a gated cross-attention layer."""
    if not is_class(module, "idefics", "IdeficsGatedCrossAttentionLayer"):
        return None
    layer: Any = module
    if activation_of(layer.mlp.act_fn) is None:
        return f"{type(layer.mlp.act_fn).__name__} is not an activation the kernels know"
    scale_of(layer.cross_attn)
    return ()
