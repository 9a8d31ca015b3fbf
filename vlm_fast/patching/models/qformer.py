"""Patch of the Q-Formers of transformers: BLIP-2, InstructBLIP and InstructBLIP-Video.

Three classes are patched: model (`qformer_model`), encoder and layer. The encoder computes what all
layers share. A layer whose children must be called (LoRA, quantization, hooks) runs its original
forward.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from vlm_fast.fallback import record_fallback
from vlm_fast.modules.parameter_access.module_calls import (
    MAPS_REQUESTED,
    collects_attentions,
    unwrap_checkpoint,
)
from vlm_fast.modules.parameter_access.module_tree import why_not_direct_tree
from vlm_fast.modules.qformer.arguments import check_image
from vlm_fast.modules.qformer.layer import qformer_layer
from vlm_fast.modules.qformer.layer_inputs import LayerInputs
from vlm_fast.modules.qformer.shared_inputs import (
    dropout_seeds,
)
from vlm_fast.modules.qformer.whole_layer import dropout_switches
from vlm_fast.patching.models.qformer_classes import QFormerSettings
from vlm_fast.patching.models.qformer_masks import additive_mask, layer_inputs, why_not_masks
from vlm_fast.patching.models.qformer_plan import (
    plan_of,
    recalled_plan,
    remember_plan,
    why_not_dtypes,
)
from vlm_fast.patching.patched_module import PatchedModule, why_no_extra_arguments_for


class FusedQFormerEncoder(PatchedModule):
    """Replaces the forward of the encoder: what all layers share is computed once.

    This is the keys and values of the image for all layers, masks, and seeds of dropout.
    """

    layer: Any
    config: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None,
        query_length: int = 0,
        head_mask: Any = None,
        cache: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = False,
        output_hidden_states: bool | None = False,
        return_dict: bool | None = True,
        **kwargs: Any,
    ) -> Any:
        masks = attention_mask, encoder_attention_mask
        reason = MAPS_REQUESTED if collects_attentions() or output_attentions else self.why_not()
        reason = reason or _why_old_arguments(head_mask, cache)
        if (use_cache or output_hidden_states) and "use_cache" in self.argument_names[
            "forward"
        ].known:
            reason = "its keys and values, or its hidden states, were asked for"
        reason = reason or why_not_masks(*masks)
        if reason is None:
            plan = plan_of(self)
            reason = plan.why_not_dtypes(hidden_states, encoder_hidden_states)
        if reason is not None:
            record_fallback(type(self).__name__, reason)
            if getattr(self.config, "_attn_implementation", None) == "eager":
                masks = (
                    additive_mask(masks[0], hidden_states),
                    additive_mask(masks[1], hidden_states),
                )
            return self.call_base(
                "forward", hidden_states=hidden_states, attention_mask=masks[0],
                encoder_hidden_states=encoder_hidden_states, encoder_attention_mask=masks[1],
                query_length=query_length, head_mask=head_mask, cache=cache, use_cache=use_cache,
                output_attentions=output_attentions, output_hidden_states=output_hidden_states,
                return_dict=return_dict, **kwargs,
            )  # fmt: skip
        image = encoder_hidden_states
        check_image(plan.image, query_length, hidden_states.shape[0], image, None, None)
        inputs = layer_inputs(hidden_states, *masks, query_length)
        dtype = hidden_states.dtype
        with _autocast(self.patch_spec.settings, hidden_states):
            read = None if inputs.image_bias is not None else image
            images, inputs.projected = plan.image.inputs(read, None, plain=True)
            seeds = dropout_seeds(plan.dropouts, len(plan.layers), hidden_states)
            for i, layer in enumerate(plan.layers):
                if seeds is not None:
                    inputs = inputs.for_layer(inputs.projected, seeds[i], True)
                read = images[i]
                # By position: reentrant checkpointing differentiates positional arguments only.
                hidden_states = layer(
                    hidden_states, *plan.absent[i], image if read is None else read, inputs=inputs
                )
        if hidden_states.dtype != dtype:
            hidden_states = hidden_states.to(dtype)
        if not return_dict:
            return (hidden_states,)
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        output: Any = BaseModelOutputWithPastAndCrossAttentions
        return output(last_hidden_state=hidden_states)

    def why_not(self) -> str | None:
        if recalled_plan(self) is not None:
            return None
        if len(self.layer) != self.config.num_hidden_layers:
            return f"it has {len(self.layer)} layers, its config {self.config.num_hidden_layers}"
        if getattr(self.config, "gradient_checkpointing", False):
            return "its config, not its layers, says that it checkpoints"
        for i, layer in enumerate(self.layer):
            reason = (
                why_no_extra_arguments_for(layer, FusedQFormerLayer)
                or unwrap_checkpoint(layer).why_not()
            )
            if reason is not None:
                return f"layer {i}: {reason}"
        remember_plan(self)
        return None


class FusedQFormerLayer(PatchedModule):
    """Replaces the forward of a layer; ``inputs`` comes from `FusedQFormerEncoder`."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None,
        query_length: int = 0,
        head_mask: Any = None,
        cache: Any = None,
        output_attentions: bool | None = False,
        *,
        inputs: LayerInputs | None = None,
        **kwargs: Any,
    ) -> Any:
        if inputs is not None:  # from the encoder, which has checked everything
            return qformer_layer(self, hidden_states, encoder_hidden_states, inputs=inputs)
        reason = MAPS_REQUESTED if collects_attentions() or output_attentions else self.why_not()
        reason = reason or _why_old_arguments(head_mask, cache)
        reason = reason or why_not_masks(attention_mask, encoder_attention_mask)
        reason = reason or why_not_dtypes(self, hidden_states, encoder_hidden_states)
        if reason is not None:
            record_fallback(type(self).__name__, reason)
            return self.call_base(
                "forward", hidden_states=hidden_states, attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask, query_length=query_length,
                head_mask=head_mask, cache=cache, output_attentions=output_attentions, **kwargs,
            )  # fmt: skip
        inputs = layer_inputs(hidden_states, attention_mask, encoder_attention_mask, query_length)
        # In these releases a layer returns its keys and values too.
        inputs.keep = "output_attentions" in self.argument_names["forward"].known
        seeds = dropout_seeds(dropout_switches(self), 1, hidden_states)
        inputs.seeds = None if seeds is None else seeds[0]
        dtype = hidden_states.dtype
        with _autocast(self.patch_spec.settings, hidden_states):
            found = qformer_layer(self, hidden_states, encoder_hidden_states, inputs=inputs)
        if inputs.keep:
            return found[0].to(dtype), found[1:]
        return found.to(dtype)

    def why_not(self) -> str | None:
        this: Any = self
        for name in ("attention", "crossattention"):
            block = getattr(self, name, None)
            if getattr(getattr(block, "attention", None), "save_attention", False):
                return f"{name} keeps its attention maps"
            if getattr(block, "pruned_heads", None):
                return f"{name} has been pruned"
        return why_not_direct_tree(this)


def _why_old_arguments(head_mask: Any, cache: Any) -> str | None:
    """Why arguments of transformers before 5.0, a head mask or a cache, prevent the fused ops."""
    heads = head_mask if isinstance(head_mask, (list, tuple)) else [head_mask]
    if any(mask is not None for mask in heads):
        return "a mask of heads was given"
    return None if cache is None else "keys and values from before were given"


def _autocast(settings: QFormerSettings, x: Tensor) -> Any:
    """Autocast to the compute_dtype of the settings, if there is one."""
    if settings.compute_dtype is None:
        return nullcontext()
    return torch.autocast(x.device.type, dtype=settings.compute_dtype)
