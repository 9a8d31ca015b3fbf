"""Patch of the Q-Former model around the encoder: shared queries, and masks without host syncs.

The model's own ``forward`` runs, with masks in a form that it passes on unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_fast.modules.parameter_access.module_calls import collects_hidden_states
from vlm_fast.modules.qformer.shared_inputs import has_active_dropout
from vlm_fast.patching.models.qformer import FusedQFormerEncoder
from vlm_fast.patching.patched_module import PatchedModule, why_no_extra_arguments_for


class FusedQFormerModel(PatchedModule):
    """Replaces the forward of Blip2QFormerModel and InstructBlip(Video)QFormerModel.

    Queries that are the same for all images are computed once up to the first cross-attention, and
    the host does not read a mask from the device.
    """

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
        is_masked = attention_mask is not None or encoder_attention_mask is not None
        if (
            (is_masked or _is_expanded(query_embeds))  # otherwise nothing is to be changed
            and not self._is_requested("output_attentions", forwarded)
            and self.why_not() is None
        ):
            if not self.patch_spec.settings.additive:
                masks = {name: self._mask(mask) for name, mask in masks.items()}
            if masks["attention_mask"] is None and self._shares_queries(given):
                # Up to the first cross-attention all images share the result.
                given["query_embeds"] = query_embeds[:1]
        return self.call_base("forward", **masks, **given)

    def _shares_queries(self, given: dict[str, Any]) -> bool:
        """Whether the layers before the image is read give the same result for the whole batch."""
        query, image = given["query_embeds"], given["encoder_hidden_states"]
        dropout: Any = getattr(self, "dropout", None)
        return (
            dropout is not None
            and _is_expanded(query)
            and given.get("input_ids") is None
            and given.get("cache") is None
            and isinstance(image, Tensor)
            and image.shape[0] == query.shape[0]
            and given["query_length"] in (None, query.shape[1])
            and hasattr(self.encoder.layer[0], "crossattention")
            and not self._returns_hidden_states(given)
            and not (dropout.training and dropout.p > 0)
            and not has_active_dropout(self.encoder.layer[:1])
        )

    def _is_requested(self, option: str, kwargs: dict[str, Any]) -> bool:
        """Whether an option of the call, or else the config, asks for an extra output."""
        value = kwargs.get(option)
        return bool(getattr(self.config, option, False) if value is None else value)

    def _returns_hidden_states(self, kwargs: dict[str, Any]) -> bool:
        """Whether hidden states before the image is read are visible to the caller or to a hook."""
        before = (self.layernorm, self.dropout)  # type: ignore[attr-defined]
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in before)
        return (
            hooked or self._is_requested("output_hidden_states", kwargs) or collects_hidden_states()
        )

    def _mask(self, mask: Any) -> Any:
        """A mask ``(batch, 1, 1, keys)``, which transformers passes on unchanged; None for no mask.

        On the CPU a mask that masks nothing becomes None too.
        """
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return mask
        on_host = mask.is_cpu and not torch.compiler.is_compiling()
        if on_host and bool((mask != 0).all()):
            return None
        return (mask != 0)[:, None, None]

    def why_not(self) -> str | None:
        reason = why_no_extra_arguments_for(self.encoder, FusedQFormerEncoder)
        return self.encoder.why_not() if reason is None else f"encoder: {reason}"


def _is_expanded(query: Any) -> bool:
    """Whether queries ``(batch, tokens, features)`` are the same for a batch of several."""
    is_batch = isinstance(query, Tensor) and query.ndim == 3 and query.shape[0] > 1
    return is_batch and query.stride(0) == 0
