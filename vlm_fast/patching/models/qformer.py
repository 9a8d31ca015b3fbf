"""The Q-Formers of transformers: BLIP-2's, and those of InstructBLIP and Granite speech like it.

Three classes are swapped, told by their children. The model's own ``forward`` runs, with masks it
passes on as they are; the encoder finds what all layers share; each layer computes. A layer with a
child that is not plain (LoRA, quantisation, hooks) runs its own forward.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlm_fast.fallback import record_fallback
from vlm_fast.modules.parameter_access.activation import activation_name
from vlm_fast.modules.parameter_access.attention_settings import (
    active_attention_dropout,
    attention_scale,
)
from vlm_fast.modules.parameter_access.module_calls import (
    collects_attentions,
    collects_hidden_states,
    unwrap_checkpoint,
)
from vlm_fast.modules.parameter_access.module_tree import (
    tree_parameters,
    why_not_direct_tree,
    why_tree_dtypes_differ,
)
from vlm_fast.modules.parameter_access.original_code import names_used_by
from vlm_fast.modules.qformer.layer import LayerInputs, qformer_layer
from vlm_fast.modules.qformer.shared_inputs import (
    check_image,
    dropout_seeds,
    drops,
    images_of_layers,
    self_attention_masks,
)
from vlm_fast.patching.patched_module import PatchedModule, why_no_extra_arguments_for

ATTENTIONS = "attention maps were asked for, which no kernel forms"


class QFormerSettings(NamedTuple):
    """How a Q-Former is to be run.

    ``additive``: whether the model makes additive masks itself, as it does before transformers 5.9.
    """

    compute_dtype: torch.dtype | None = None
    additive: bool = False


class FusedQFormerModel(PatchedModule):
    """A Q-Former model that neither expands queries nor reads a mask on the host."""

    same_call_signature = True

    encoder: Any
    config: Any

    def forward(
        self,
        *,
        query_embeds: Any = None,
        query_length: int | None = None,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        **forwarded: Any,
    ) -> Any:
        masks = {
            "attention_mask": attention_mask,
            "encoder_attention_mask": encoder_attention_mask,
        }
        given: dict[str, Any] = {
            "query_embeds": query_embeds,
            "query_length": query_length,
            "encoder_hidden_states": encoder_hidden_states,
            **forwarded,
        }
        if not self._asks("output_attentions", forwarded) and self.why_not() is None:
            if not self.patch_spec.settings.additive:
                masks = {name: self._mask(mask) for name, mask in masks.items()}
            if masks["attention_mask"] is None and self._shares_queries(given):
                # What comes before the image is the same for all.
                given["query_embeds"] = query_embeds[:1]
        return self.call_base("forward", **masks, **given)

    def _shares_queries(self, given: dict[str, Any]) -> bool:
        query, image = given["query_embeds"], given["encoder_hidden_states"]
        dropout: Any = getattr(self, "dropout", None)
        return (
            dropout is not None
            and isinstance(query, Tensor)
            and query.ndim == 3
            and query.shape[0] > 1
            and query.stride(0) == 0
            and given.get("input_ids") is None
            and given.get("cache") is None
            and isinstance(image, Tensor)
            and image.shape[0] == query.shape[0]
            and given["query_length"] in (None, query.shape[1])
            and hasattr(self.encoder.layer[0], "crossattention")
            and not self._shows_hidden_states(given)
            and not (dropout.training and dropout.p > 0)
            and not drops(self.encoder.layer[:1])
        )

    def _asks(self, option: str, kwargs: dict[str, Any]) -> bool:
        asked = kwargs.get(option)
        return bool(getattr(self.config, option, False) if asked is None else asked)

    def _shows_hidden_states(self, kwargs: dict[str, Any]) -> bool:
        """Whether somebody looks at what comes before the image is read."""
        before = (self.layernorm, self.dropout)  # type: ignore[attr-defined]
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in before)
        return hooked or self._asks("output_hidden_states", kwargs) or collects_hidden_states()

    def _mask(self, mask: Any) -> Any:
        """As transformers passes on a mask that is prepared; one that hides nothing is dropped."""
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return mask
        on_host = mask.is_cpu and not torch.compiler.is_compiling()
        if on_host and bool((mask != 0).all()):
            return None
        return (mask != 0)[:, None, None]

    def why_not(self) -> str | None:
        reason = why_no_extra_arguments_for(self.encoder, FusedQFormerEncoder)
        return self.encoder.why_not() if reason is None else f"encoder: {reason}"


class FusedQFormerEncoder(PatchedModule):
    """The layers of a Q-Former, with what they share computed once."""

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
        reason = ATTENTIONS if collects_attentions() or output_attentions else self.why_not()
        reason = reason or _why_not_old(head_mask, cache)
        if (use_cache or output_hidden_states) and "use_cache" in self.argument_names[
            "forward"
        ].known:
            reason = "its keys and values, or its hidden states, were asked for"
        reason = reason or _why_not_masks(*masks)
        for layer in self.layer if reason is None else ():
            reason = reason or _why_not_dtypes(layer, hidden_states, encoder_hidden_states)
        if reason is not None:
            record_fallback(type(self).__name__, reason)
            if getattr(self.config, "_attn_implementation", None) == "eager":
                masks = _additive(masks[0], hidden_states), _additive(masks[1], hidden_states)
            return self.call_base(
                "forward", hidden_states=hidden_states, attention_mask=masks[0],
                encoder_hidden_states=encoder_hidden_states, encoder_attention_mask=masks[1],
                query_length=query_length, head_mask=head_mask, cache=cache, use_cache=use_cache,
                output_attentions=output_attentions, output_hidden_states=output_hidden_states,
                return_dict=return_dict, **kwargs,
            )  # fmt: skip
        image = encoder_hidden_states
        check_image(self, query_length, hidden_states.shape[0], image, None, None)
        inputs = layer_inputs(hidden_states, *masks, query_length)
        dtype = hidden_states.dtype
        with _computing(self.patch_spec.settings, hidden_states):
            images = images_of_layers(
                self, hidden_states, None if inputs.image_bias is not None else image, None,
                query_length, plain=True,
            )  # fmt: skip
            seeds = dropout_seeds(self.layer, hidden_states)
            for i, layer in enumerate(self.layer):
                of_layer = dataclasses.replace(  # its own: checkpointing comes back to it
                    inputs, projected=images[i][1], seeds=None if seeds is None else seeds[i]
                )
                read = image if images[i][0] is None else images[i][0]
                # By position, through which reentrant checkpointing differentiates.
                between = unwrap_checkpoint(layer).argument_names["forward"].positional
                between = between[1 : between.index("encoder_hidden_states")]
                hidden_states = layer(hidden_states, *[None] * len(between), read, inputs=of_layer)
        if hidden_states.dtype != dtype:
            hidden_states = hidden_states.to(dtype)
        if not return_dict:
            return (hidden_states,)
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        output: Any = BaseModelOutputWithPastAndCrossAttentions
        return output(last_hidden_state=hidden_states)

    def why_not(self) -> str | None:
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
        return None


class FusedQFormerLayer(PatchedModule):
    """One layer of a Q-Former."""

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
        if inputs is not None:  # from the encoder, which has looked
            return qformer_layer(self, hidden_states, encoder_hidden_states, inputs=inputs)
        reason = ATTENTIONS if collects_attentions() or output_attentions else self.why_not()
        reason = reason or _why_not_old(head_mask, cache)
        reason = reason or _why_not_masks(attention_mask, encoder_attention_mask)
        reason = reason or _why_not_dtypes(self, hidden_states, encoder_hidden_states)
        if reason is not None:
            record_fallback(type(self).__name__, reason)
            return self.call_base(
                "forward", hidden_states=hidden_states, attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask, query_length=query_length,
                head_mask=head_mask, cache=cache, output_attentions=output_attentions, **kwargs,
            )  # fmt: skip
        inputs = layer_inputs(hidden_states, attention_mask, encoder_attention_mask, query_length)
        # A layer that takes this returns its keys and values.
        inputs.keep = "output_attentions" in self.argument_names["forward"].known
        seeds = dropout_seeds([self], hidden_states)
        inputs.seeds = None if seeds is None else seeds[0]
        dtype = hidden_states.dtype
        with _computing(self.patch_spec.settings, hidden_states):
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


def _why_not_old(head_mask: Any, cache: Any) -> str | None:
    """Why what only releases before 5.0 take is not served, or None."""
    heads = head_mask if isinstance(head_mask, (list, tuple)) else [head_mask]
    if any(mask is not None for mask in heads):
        return "a mask of heads was given"
    return None if cache is None else "keys and values from before were given"


def layer_inputs(hidden: Tensor, mask: Any, image_mask: Any, query_length: int) -> LayerInputs:
    """Masks as transformers prepares them, as a layer takes them."""
    key_mask, bias = self_attention_masks(_unless_empty(mask), hidden)
    seen, image_bias = self_attention_masks(_unless_empty(image_mask), hidden)
    if image_bias is not None and image_bias.shape[2] > query_length:
        image_bias = image_bias[:, :, :query_length]
    return LayerInputs(
        query_length=query_length, image_mask=seen, image_bias=image_bias,
        key_mask=key_mask, bias=bias,
    )  # fmt: skip


def _unless_empty(mask: Any) -> Any:
    """An additive mask, or None for one on the host that hides nothing."""
    additive = isinstance(mask, Tensor) and mask.is_floating_point() and mask.ndim == 4
    if additive and mask.is_cpu and not torch.compiler.is_compiling() and not mask.any():
        return None
    return mask


def _why_not_dtypes(layer: Any, hidden: Tensor, image: Tensor | None) -> str | None:
    """Why a layer cannot compute in one dtype, or None; autocast's takes float32 parameters."""
    layer, device = unwrap_checkpoint(layer), hidden.device.type
    if not torch.is_autocast_enabled(device):
        return why_tree_dtypes_differ(layer, hidden, image)
    taken = (torch.float32, torch.get_autocast_dtype(device))
    found = next((p.dtype for p in tree_parameters(layer) if p.dtype not in taken), None)
    return None if found is None else f"it has parameters in {found} under autocast to {taken[1]}"


def _why_not_masks(*masks: Any) -> str | None:
    for mask in masks:
        if mask is not None and not isinstance(mask, Tensor):
            return f"a {type(mask).__name__} is no mask the kernels read"
    return None


def _additive(mask: Any, hidden: Tensor) -> Any:
    """A boolean mask as the eager attention of transformers adds it."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return mask
    hidden_value = torch.finfo(hidden.dtype).min
    return torch.zeros_like(mask, dtype=hidden.dtype).masked_fill_(~mask, hidden_value)


def _computing(recipe: QFormerSettings, x: Tensor) -> Any:
    if recipe.compute_dtype is None:
        return nullcontext()
    return torch.autocast(x.device.type, dtype=recipe.compute_dtype)


_ATTENTION = {"query", "key", "value"}
_OUTPUT = {"dense", "LayerNorm", "dropout"}


def _has(module: Any, names: set[str]) -> bool:
    return isinstance(module, nn.Module) and names <= dict(module.named_children()).keys()


def _is_layer(module: nn.Module) -> bool:
    if not _has(module, {"attention", "intermediate_query", "output_query"}):
        return False
    layer: Any = module
    blocks = [layer.attention, *filter(None, [getattr(layer, "crossattention", None)])]
    return all(
        _has(block, {"attention", "output"})
        and _has(block.attention, _ATTENTION)
        and _has(block.output, _OUTPUT)
        for block in blocks
    ) and _has(layer.output_query, _OUTPUT)


def recognise_layer(module: nn.Module, **options: Any) -> QFormerSettings | str | None:
    """The recipe, a reason against, or None for no layer of a Q-Former."""
    if not _is_layer(module):
        return None
    layer: Any = module
    if not _known(type(module)):
        return f"the forward of {type(module).__name__} is not one that was read"
    if getattr(layer, "chunk_size_feed_forward", 0):
        return "chunk_size_feed_forward is set"
    if activation_name(layer.intermediate_query.intermediate_act_fn) is None:
        return f"{type(layer.intermediate_query.intermediate_act_fn).__name__} is not known"
    for block in (layer.attention, getattr(layer, "crossattention", layer.attention)):
        if getattr(block.attention, "position_embedding_type", "absolute") != "absolute":
            return f"its positions are {block.attention.position_embedding_type}"
        attention_scale(block.attention), active_attention_dropout(block.attention)
        block.attention.num_attention_heads  # noqa: B018
    return QFormerSettings(options.get("compute_dtype"))


def recognise_encoder(module: nn.Module, **options: Any) -> QFormerSettings | str | None:
    """The same for the encoder around such layers."""
    layers = getattr(module, "layer", None)
    if not isinstance(layers, nn.ModuleList) or not layers or not _known(type(module)):
        return None
    found = [recognise_layer(layer, **options) for layer in layers]
    return next((f for f in found if not isinstance(f, QFormerSettings)), found[0])


def recognise_model(module: nn.Module, **options: Any) -> QFormerSettings | str | None:
    """The same for the model around such an encoder."""
    encoder = getattr(module, "encoder", None)
    if not isinstance(encoder, nn.Module) or not _known(type(module)):
        return None
    found = recognise_encoder(encoder, **options)
    if not isinstance(found, QFormerSettings):
        return found
    names = names_used_by(type(module).forward)
    return found._replace(additive="get_extended_attention_mask" in names)


def _known(cls: type[nn.Module]) -> bool:
    """Q-Formers of transformers whose forwards are those of BLIP-2 or InstructBLIP."""
    return cls.__module__.startswith("transformers.models.") and any(
        cls.__name__.startswith(family) and cls.__name__.endswith(("Model", "Encoder", "Layer"))
        for family in ("Blip2QFormer", "InstructBlipQFormer", "InstructBlipVideoQFormer")
    )
