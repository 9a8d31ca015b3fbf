"""Patch of Kosmos-2's and Kosmos-2.5's resampler: latents attend to the image and to themselves.

In transformers, Kosmos-2's resampler under SDPA is causal and crops the keys to the number of
latents, which is a mistake. Eager attention is right; the patch computes the same.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.fallback import record_fallback
from vlm_fast.modules.parameter_access.module_tree import (
    why_not_direct_tree,
    why_tree_dtypes_differ,
)
from vlm_fast.patching.class_swap import is_class
from vlm_fast.patching.patched_module import PatchedModule


class FusedKosmosProjection(PatchedModule):
    """Replaces the forward of Kosmos2ImageToTextProjection and Kosmos2_5ImageToTextProjection.

    No attention maps are returned.
    """

    same_call_signature = True

    dense: Any
    latent_query: Any
    x_attn: Any
    training: bool
    required_attributes: ClassVar[tuple[str, ...]] = (
        *(f"x_attn.{name}" for name in (
            "num_heads", "head_dim", "scaling", "dropout", "q_proj", "k_proj", "v_proj", "out_proj",
        )),
    )  # fmt: skip

    def forward(self, features: Tensor) -> Any:
        reason = self.why_not() or why_tree_dtypes_differ(self, features)  # type: ignore[arg-type]
        if reason is not None:
            record_fallback(type(self).__name__, reason)
            return super().forward(features)  # type: ignore[misc]
        attn, image, latents = self.x_attn, self.dense(features), self.latent_query.unsqueeze(0)
        images = image.shape[0]
        seen = torch.cat((image, latents.expand(images, -1, -1)), dim=1)
        # The bias of keys adds the same to all scores of a query: no effect, gradient 0.
        k = torch.addmm(attn.k_proj.bias, seen.flatten(0, 1), attn.k_proj.weight.t(), beta=0)

        def heads(x: Tensor, tokens: int) -> Tensor:
            return x.view(-1, tokens, attn.num_heads, attn.head_dim).transpose(1, 2)

        q = heads(attn.q_proj(latents), latents.shape[1]).expand(images, -1, -1, -1)
        attended = ops.cross_attention(
            q, heads(k, seen.shape[1]), heads(attn.v_proj(seen), seen.shape[1]), scale=attn.scaling
        )
        return attn.out_proj(attended.transpose(1, 2).flatten(2)), None

    def unpatched_copy(self) -> nn.Module:
        """A copy with the original class, eager attention, and None instead of attention maps."""
        plain: Any = super().unpatched_copy()
        if self.why_not() is None:
            plain.x_attn.config._attn_implementation = "eager"
            plain.register_forward_hook(lambda module, args, found: (found[0], None))
        return plain

    def why_not(self) -> str | None:
        attn = self.x_attn
        if attn.config._attn_implementation == "eager":
            return "eager attention returns its maps, which no kernel forms"
        if self.training and attn.dropout > 0:
            return "attention has dropout"
        if getattr(attn, "inner_attn_ln", None) is not None:
            return "its attention has a norm inside"
        return why_not_direct_tree(self)  # type: ignore[arg-type]


def recognise(module: nn.Module, **options: Any) -> tuple[()] | str | None:
    """Empty settings, a reason not to patch, or None for another class."""
    known = is_class(module, "kosmos2", "Kosmos2ImageToTextProjection") or is_class(
        module, "kosmos2_5", "Kosmos2_5ImageToTextProjection"
    )
    if not known:
        return None
    projection: Any = module
    if not hasattr(projection.x_attn, "config"):  # before transformers 4.52
        return "its attention is always the eager one, whose maps no kernel forms"
    return ()
