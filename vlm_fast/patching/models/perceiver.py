"""Patches of Perceiver resamplers: IDEFICS' and OpenFlamingo's (by class name and children)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vlm_fast.fallback import record_fallback
from vlm_fast.modules.parameter_access.activation import activation_name
from vlm_fast.modules.parameter_access.module_tree import (
    derived,
    why_not_direct_tree,
    why_tree_dtypes_differ,
)
from vlm_fast.modules.perceiver_layer import Layer, directly, fused_sequence, resample
from vlm_fast.modules.perceiver_resampler import resample_media
from vlm_fast.patching.class_swap import is_class
from vlm_fast.patching.patched_module import PatchedModule


class FusedPerceiver(PatchedModule):
    """Replaces the forward of OpenFlamingo's PerceiverResampler, without concatenating keys."""

    same_call_signature = True

    def forward(self, x: Tensor) -> Any:
        reason = self.why_not()
        if reason is not None:
            record_fallback(type(self).__name__, reason)
            return super().forward(x)  # type: ignore[misc]
        return resample_media(self, x, None)

    def why_not(self) -> str | None:
        return why_not_direct_tree(self, biases=False)  # type: ignore[arg-type]


class FusedIdeficsPerceiver(PatchedModule):
    """Replaces the forward of IdeficsPerceiverResampler, without concatenating keys."""

    same_call_signature = True

    blocks: Any
    latents: Any
    layer_norm: Any
    required_attributes: ClassVar[tuple[str, ...]] = (
        *(f"blocks.0.0.{name}" for name in (
            "context_layer_norm", "latents_layer_norm", "q_proj", "k_proj", "v_proj",
            "output_proj", "n_heads", "qk_layer_norms", "qk_scale",
        )),
        *(f"blocks.0.1.{name}" for name in ("ln", "fc", "act", "c_proj")),
    )  # fmt: skip

    def forward(self, context: Tensor) -> Tensor:
        reason = self.why_not() or why_tree_dtypes_differ(self, context)  # type: ignore[arg-type]
        if reason is not None:
            record_fallback(type(self).__name__, reason)
            return super().forward(context)  # type: ignore[misc]
        found = resample(context, self.latents, derived(self, _layers_of_idefics))
        return self.layer_norm(found)

    def why_not(self) -> str | None:
        return why_not_direct_tree(self, biases=False)  # type: ignore[arg-type]


def _layers_of_idefics(resampler: Any) -> list[Layer]:
    return [directly(_layer_of_idefics(attention, ff)) for attention, ff in resampler.blocks]


def _layer_of_idefics(attention: Any, ff: Any) -> Layer:
    norms = (attention.q_layer_norm, attention.k_layer_norm) if attention.qk_layer_norms else None
    return Layer(
        attention.context_layer_norm, attention.latents_layer_norm, attention.q_proj,
        (attention.k_proj, attention.v_proj), attention.output_proj, attention.n_heads,
        attention.n_heads, attention.qk_scale, fused_sequence(ff.ln, ff.fc, ff.act, ff.c_proj),
        norms,
    )  # fmt: skip


def recognise_idefics(module: nn.Module, **options: Any) -> tuple[()] | str | None:
    """Empty settings for IdeficsPerceiverResampler, or None for another class."""
    return () if is_class(module, "idefics", "IdeficsPerceiverResampler") else None


def recognise(module: nn.Module, **options: Any) -> tuple[()] | str | None:
    """Empty settings for OpenFlamingo's class, a reason not to patch, or None for another class."""
    kind, resampler = type(module), module
    if kind.__name__ != "PerceiverResampler" or kind.__module__.startswith("vlm_fast."):
        return None
    reason = "its children are not those of OpenFlamingo"
    layers = getattr(resampler, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(resampler, "norm"):
        return reason
    if (
        not {"latents", "frame_embs", "media_time_embs"}
        <= vars(module).keys() | dict(module.named_parameters(recurse=False)).keys()
    ):
        return reason
    names = {"norm_media", "norm_latents", "to_q", "to_kv", "to_out"}
    for layer in layers:
        children: list[Any] = list(layer.children())
        if len(children) != 2 or dict(children[0].named_children()).keys() != names:
            return reason
        ff = list(children[1].children())
        if list(map(type, ff)) != [nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear]:
            return "its feed-forward network is not LayerNorm, Linear, GELU, Linear"
        if activation_name(ff[2]) is None:
            return "its activation is not one the kernels know"
    return ()
