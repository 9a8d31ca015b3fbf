"""Patch of Idefics2: the Perceiver resampler with grouped-query attention, and its gated MLPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.fallback import record_fallback
from vlm_fast.modules.gated_residual import rms_norm
from vlm_fast.modules.parameter_access.activation import activation_name, why_not_activation
from vlm_fast.modules.parameter_access.attention_settings import attention_scale
from vlm_fast.modules.parameter_access.linear import why_not_direct
from vlm_fast.modules.parameter_access.module_calls import (
    MAPS_REQUESTED,
    collects_attentions,
)
from vlm_fast.modules.parameter_access.module_tree import (
    derived,
    why_not_direct_tree,
    why_tree_dtypes_differ,
)
from vlm_fast.modules.parameter_access.remembered import ask_once
from vlm_fast.modules.perceiver_layer import Layer, directly, resample
from vlm_fast.ops.argument_errors import wrong_value
from vlm_fast.patching.class_swap import is_class
from vlm_fast.patching.patched_module import PatchedModule


class FusedGatedMLP(PatchedModule):
    """Replaces the forward of Idefics2MLP: ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``.

    It keeps fewer tensors for backward than eager PyTorch, see `vlm_fast.ops.gated_mlp`.
    """

    same_call_signature = True

    gate_proj: Any
    up_proj: Any
    down_proj: Any
    act_fn: Any

    def forward(self, x: Tensor) -> Tensor:
        reason = self.why_not()
        if reason is not None:
            record_fallback(type(self).__name__, reason)
            return super().forward(x)  # type: ignore[misc]
        return ops.gated_mlp(
            x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight,
            activation=activation_name(self.act_fn) or "",
        )  # fmt: skip

    def why_not(self) -> str | None:
        return ask_once(
            self, self._why_not,
            lambda: (self.gate_proj, self.up_proj, self.down_proj, self.act_fn),
        )  # fmt: skip

    def _why_not(self) -> str | None:
        for name in ("gate_proj", "up_proj", "down_proj"):
            reason = why_not_direct(getattr(self, name))
            if reason is None and getattr(self, name).bias is not None:
                reason = "it has a bias"
            if reason is not None:
                return f"{name}: {reason}"
        reason = why_not_activation(self.act_fn)
        return None if reason is None else f"act_fn: {reason}"


class FusedIdefics2Perceiver(PatchedModule):
    """Replaces the forward of Idefics2PerceiverResampler.

    Keys of the context and of the latents are not concatenated, nor repeated for each query head.
    """

    same_call_signature = True

    layers: Any
    latents: Any
    training: bool
    required_attributes: ClassVar[tuple[str, ...]] = (
        *(f"layers.0.{name}" for name in (
            "input_context_norm.variance_epsilon", "input_latents_norm.variance_epsilon",
            "post_attention_layernorm.variance_epsilon", "mlp",
        )),
        *(f"layers.0.self_attn.{name}" for name in (
            "num_heads", "num_key_value_heads", "head_dim", "q_proj", "k_proj", "v_proj", "o_proj",
        )),
    )  # fmt: skip

    def forward(self, context: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        reason = self.why_not()
        reason = reason or why_tree_dtypes_differ(self, context)  # type: ignore[arg-type]
        if collects_attentions() or kwargs.get("output_attentions"):
            reason = MAPS_REQUESTED
        if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
            reason = "the mask is not one of patches, (images, patches)"
        if reason is not None:
            record_fallback(type(self).__name__, reason)
            return self.call_base(
                "forward", context=context, attention_mask=attention_mask, **kwargs
            )
        if attention_mask.shape != context.shape[:2]:
            wanted = f"{tuple(context.shape[:2])}, one for each patch of context"
            raise wrong_value("patch(Idefics2)", "attention_mask", attention_mask, wanted)
        seen: Tensor | None = attention_mask != 0
        if seen is not None and seen.is_cpu and not torch.compiler.is_compiling() and seen.all():
            seen = None  # nothing is masked; on a GPU the host would wait for this answer
        layers, norm = derived(self, _layers_of)
        return norm(resample(context, self.latents, layers, seen))

    def why_not(self) -> str | None:
        attentions = [layer.self_attn for layer in self.layers]
        if self.training and any(getattr(a, "attention_dropout", 0) > 0 for a in attentions):
            return "attention has dropout"
        return why_not_direct_tree(self, biases=False)  # type: ignore[arg-type]


def _layers_of(resampler: Any) -> tuple[list[Layer], Callable[[Tensor], Tensor]]:
    """The layers, and the last norm."""
    return [_layer(layer) for layer in resampler.layers], _norm(resampler.norm)


def _layer(layer: Any) -> Layer:
    attention = layer.self_attn
    norm = _norm(layer.post_attention_layernorm)
    return directly(Layer(
        _norm(layer.input_context_norm), _norm(layer.input_latents_norm), attention.q_proj,
        (attention.k_proj, attention.v_proj), attention.o_proj, attention.num_heads,
        attention.num_key_value_heads, attention_scale(attention), lambda x: layer.mlp(norm(x)),
    ))  # fmt: skip


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """An Idefics2RMSNorm as a function; it is called where it would change the input's dtype."""
    dtype = norm.weight.dtype
    return lambda x: rms_norm(x, norm) if x.dtype is dtype else norm(x)


def recognise_mlp(module: nn.Module, **options: Any) -> tuple[()] | str | None:
    """Empty settings, a reason not to patch, or None for another class."""
    if not is_class(module, "idefics2", "Idefics2MLP"):
        return None
    mlp: Any = module
    if activation_name(mlp.act_fn) is None:
        return f"{type(mlp.act_fn).__name__} is not an activation the kernels know"
    return ()


def recognise_resampler(module: nn.Module, **options: Any) -> tuple[()] | str | None:
    """Empty settings for Idefics2PerceiverResampler, or None for another class."""
    if not is_class(module, "idefics2", "Idefics2PerceiverResampler"):
        return None
    resampler: Any = module
    for layer in resampler.layers:
        attention_scale(layer.self_attn)
    return ()
