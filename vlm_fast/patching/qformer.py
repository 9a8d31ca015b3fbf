"""The Q-Formers of transformers: BLIP-2's, and those of InstructBLIP and Granite speech like it.

Three classes are swapped, told by their children. The model's own ``forward`` runs, with masks it
passes on as they are; the encoder finds what all layers share; each layer computes. A layer with a
child that is not plain (LoRA, quantisation, hooks) runs its own forward.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlm_fast.modules.activation import activation_of
from vlm_fast.modules.plain_tree import (
    parameters_of_tree,
    unwrapped,
    wants_attentions,
    wants_hidden_states,
    why_not_dtypes_of_tree,
    why_not_plain_tree,
)
from vlm_fast.modules.qformer_layer import LayerInputs, qformer_layer
from vlm_fast.modules.qformer_shared import (
    check_image,
    dropout_seeds,
    drops,
    images_of_layers,
    self_attention_masks,
)
from vlm_fast.patching.class_swap import Patched, why_not_handed
from vlm_fast.policy import fell_back

ATTENTIONS = "attention maps were asked for, which no kernel forms"


class Recipe(NamedTuple):
    """How a Q-Former is to be run."""

    compute_dtype: torch.dtype | None = None


class FusedQFormerModel(Patched):
    """A Q-Former model that neither expands queries nor reads a mask on the host."""

    alone = True

    encoder: Any
    config: Any
    layernorm: Any
    dropout: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._asks("output_attentions", kwargs) or self.why_not() is not None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        bound = _signature(self.patch.base.forward).bind(self, *args, **kwargs)
        given = bound.arguments
        for name in ("attention_mask", "encoder_attention_mask"):
            mask = given.get(name)
            if isinstance(mask, Tensor) and mask.ndim == 2:
                given[name] = self._mask(mask)
        query, image = given.get("query_embeds"), given.get("encoder_hidden_states")
        if (
            isinstance(query, Tensor)
            and query.ndim == 3
            and query.shape[0] > 1
            and query.stride(0) == 0
            and given.get("input_ids") is None
            and given.get("attention_mask") is None
            and isinstance(image, Tensor)
            and image.shape[0] == query.shape[0]
            and given.get("query_length") in (None, query.shape[1])
            and hasattr(self.encoder.layer[0], "crossattention")
            and not self._shows_hidden_states(kwargs)
            and not (self.dropout.training and self.dropout.p > 0)
            and not drops(self.encoder.layer[:1])
        ):
            given["query_embeds"] = query[:1]  # what comes before the image is the same for all
        return super().forward(*bound.args[1:], **bound.kwargs)  # type: ignore[misc]

    def _asks(self, option: str, kwargs: dict[str, Any]) -> bool:
        return bool(kwargs.get(option, getattr(self.config, option, False)))

    def _shows_hidden_states(self, kwargs: dict[str, Any]) -> bool:
        """Whether somebody looks at what comes before the image is read."""
        before = (self.layernorm, self.dropout)
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in before)
        return hooked or self._asks("output_hidden_states", kwargs) or wants_hidden_states()

    def _mask(self, mask: Tensor) -> Tensor | None:
        """As transformers passes on a mask that is prepared; one that hides nothing is dropped."""
        on_host = mask.is_cpu and not torch.compiler.is_compiling()
        if on_host and bool((mask != 0).all()):
            return None
        return (mask != 0)[:, None, None]

    def why_not(self) -> str | None:
        reason = why_not_handed(self.encoder, FusedQFormerEncoder)
        return self.encoder.why_not() if reason is None else f"encoder: {reason}"


class FusedQFormerEncoder(Patched):
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
        **kwargs: Any,
    ) -> Any:
        reason = ATTENTIONS if wants_attentions() else self.why_not()
        reason = reason or _why_not_masks(attention_mask, encoder_attention_mask)
        for layer in self.layer if reason is None else ():
            reason = reason or _why_not_dtypes(layer, hidden_states, encoder_hidden_states)
        if reason is not None:
            fell_back(type(self).__name__, reason)
            eager = getattr(self.config, "_attn_implementation", None) == "eager"
            masks = [
                _additive(mask, hidden_states) if eager else mask
                for mask in (attention_mask, encoder_attention_mask)
            ]
            return super().forward(  # type: ignore[misc]
                hidden_states, masks[0], encoder_hidden_states,
                encoder_attention_mask=masks[1], query_length=query_length, **kwargs,
            )  # fmt: skip
        image = encoder_hidden_states
        check_image(self, query_length, hidden_states.shape[0], image, None, None)
        inputs = layer_inputs(hidden_states, attention_mask, encoder_attention_mask, query_length)
        dtype = hidden_states.dtype
        with _computing(self.patch.recipe, hidden_states):
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
                hidden_states = layer(hidden_states, None, read, inputs=of_layer)
        if hidden_states.dtype != dtype:
            hidden_states = hidden_states.to(dtype)
        if kwargs.get("return_dict") is False:
            return (hidden_states,)
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        output: Any = BaseModelOutputWithPastAndCrossAttentions
        return output(last_hidden_state=hidden_states)

    def why_not(self) -> str | None:
        if len(self.layer) != self.config.num_hidden_layers:
            return f"it has {len(self.layer)} layers, its config {self.config.num_hidden_layers}"
        for i, layer in enumerate(self.layer):
            reason = why_not_handed(layer, FusedQFormerLayer) or unwrapped(layer).why_not()
            if reason is not None:
                return f"layer {i}: {reason}"
        return None


class FusedQFormerLayer(Patched):
    """One layer of a Q-Former."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None,
        query_length: int = 0,
        *,
        inputs: LayerInputs | None = None,
        **kwargs: Any,
    ) -> Any:
        if inputs is not None:  # from the encoder, which has looked
            return qformer_layer(self, hidden_states, encoder_hidden_states, inputs=inputs)
        reason = ATTENTIONS if wants_attentions() else self.why_not()
        reason = reason or _why_not_masks(attention_mask, encoder_attention_mask)
        reason = reason or _why_not_dtypes(self, hidden_states, encoder_hidden_states)
        if reason is not None:
            fell_back(type(self).__name__, reason)
            return super().forward(  # type: ignore[misc]
                hidden_states, attention_mask, encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask, query_length=query_length, **kwargs,
            )  # fmt: skip
        inputs = layer_inputs(hidden_states, attention_mask, encoder_attention_mask, query_length)
        seeds = dropout_seeds([self], hidden_states)
        inputs.seeds = None if seeds is None else seeds[0]
        dtype = hidden_states.dtype
        with _computing(self.patch.recipe, hidden_states):
            found = qformer_layer(self, hidden_states, encoder_hidden_states, inputs=inputs)
            return found.to(dtype)

    def why_not(self) -> str | None:
        return why_not_plain_tree(self)  # type: ignore[arg-type]


def _signature(function: Any) -> inspect.Signature:
    compiling = torch.compiler.is_compiling()  # Dynamo looks through a cache, and warns
    return inspect.signature(function) if compiling else _remembered(function)


_remembered = functools.cache(inspect.signature)


def layer_inputs(hidden: Tensor, mask: Any, image_mask: Any, query_length: int) -> LayerInputs:
    """Masks as transformers prepares them, as a layer takes them."""
    key_mask, bias = self_attention_masks(mask, hidden)
    seen, image_bias = self_attention_masks(image_mask, hidden)
    if image_bias is not None and image_bias.shape[2] > query_length:
        image_bias = image_bias[:, :, :query_length]
    return LayerInputs(
        query_length=query_length, image_mask=seen, image_bias=image_bias,
        key_mask=key_mask, bias=bias,
    )  # fmt: skip


def _why_not_dtypes(layer: Any, hidden: Tensor, image: Tensor | None) -> str | None:
    """Why a layer cannot compute in one dtype, or None; autocast's takes float32 parameters."""
    layer, device = unwrapped(layer), hidden.device.type
    if not torch.is_autocast_enabled(device):
        return why_not_dtypes_of_tree(layer, hidden, image)
    taken = (torch.float32, torch.get_autocast_dtype(device))
    found = next((p.dtype for p in parameters_of_tree(layer) if p.dtype not in taken), None)
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


def _computing(recipe: Recipe, x: Tensor) -> Any:
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


def recognise_layer(module: nn.Module, **options: Any) -> Recipe | str | None:
    """The recipe, a reason against, or None for no layer of a Q-Former."""
    if not _is_layer(module):
        return None
    layer: Any = module
    if not _known(type(module)):
        return f"the forward of {type(module).__name__} is not one that was read"
    if getattr(layer, "chunk_size_feed_forward", 0):
        return "chunk_size_feed_forward is set"
    if activation_of(layer.intermediate_query.intermediate_act_fn) is None:
        return f"{type(layer.intermediate_query.intermediate_act_fn).__name__} is not known"
    return Recipe(options.get("compute_dtype"))


def recognise_encoder(module: nn.Module, **options: Any) -> Recipe | str | None:
    """The same for the encoder around such layers."""
    layers = getattr(module, "layer", None)
    if not isinstance(layers, nn.ModuleList) or not layers or not _known(type(module)):
        return None
    found = [recognise_layer(layer, **options) for layer in layers]
    return next((f for f in found if not isinstance(f, Recipe)), found[0])


def recognise_model(module: nn.Module, **options: Any) -> Recipe | str | None:
    """The same for the model around such an encoder."""
    encoder = getattr(module, "encoder", None)
    if not isinstance(encoder, nn.Module) or not _known(type(module)):
        return None
    return recognise_encoder(encoder, **options)


def _known(cls: type[nn.Module]) -> bool:
    """Q-Formers of transformers whose forwards are those of BLIP-2 or InstructBLIP."""
    return cls.__module__.startswith("transformers.models.") and any(
        cls.__name__.startswith(family) and cls.__name__.endswith(("Model", "Encoder", "Layer"))
        for family in ("Blip2QFormer", "InstructBlipQFormer", "InstructBlipVideoQFormer")
    )
