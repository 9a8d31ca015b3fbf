"""Patch of Kosmos-2's and Kosmos-2.5's resampler: latents attend to the image and to themselves.

In transformers, Kosmos-2's resampler under SDPA is causal and crops the keys to the number of
latents, which is a mistake. Eager attention is right; the patch computes the same.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.fallback import record_fallback
from vlm_fast.modules.parameter_access.module_tree import (
    derived,
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
        read: Reading = derived(self, _reading)
        image, latents = F.linear(features, *read.dense), read.latents.unsqueeze(0)
        images = image.shape[0]
        seen = torch.cat((image, latents.expand(images, -1, -1)), dim=1)
        q, k, v = (
            F.linear(x, *linear).view(-1, x.shape[1], *read.heads).transpose(1, 2)
            for x, linear in ((latents, read.query), (seen, read.key), (seen, read.value))
        )
        attended = ops.cross_attention(q.expand(images, -1, -1, -1), k, v, scale=read.scale)
        return F.linear(attended.transpose(1, 2).flatten(2), *read.output), None

    def unpatched_copy(self) -> nn.Module:
        """A copy with the original class, eager attention, and None instead of attention maps."""
        plain: Any = super().unpatched_copy()
        if self.why_not() is None:
            plain.x_attn.config._attn_implementation = "eager"
            plain.register_forward_hook(lambda module, args, found: (found[0], None))
        return plain

    def why_not(self) -> str | None:
        reason = why_not_direct_tree(self)  # type: ignore[arg-type]
        if reason is not None:
            return reason
        read: Reading = derived(self, _reading)
        if self.training and read.dropout > 0:
            return "attention has dropout"
        return read.reason


class Reading(NamedTuple):
    """What the forward reads of a projection.

    Attributes:
        reason: why it cannot be served, or None.
        dense, query, key, value, output: weight and bias of the linears.
        latents: ``(latents, features)``.
        heads: the number of heads, and the features of one.
    """

    reason: str | None
    dropout: float
    dense: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    key: tuple[Tensor, Tensor]
    value: tuple[Tensor, Tensor]
    output: tuple[Tensor, Tensor]
    latents: Tensor
    heads: tuple[int, int]
    scale: float


def _reading(projection: Any) -> Reading:
    attn = projection.x_attn
    linears = [projection.dense, attn.q_proj, attn.k_proj, attn.v_proj, attn.out_proj]
    dense, q, k, v, output = [(linear.weight, linear.bias) for linear in linears]
    reason = None
    if attn.config._attn_implementation == "eager":
        reason = "eager attention returns its maps, which no kernel forms"
    elif getattr(attn, "inner_attn_ln", None) is not None:
        reason = "its attention has a norm inside"
    heads = (attn.num_heads, attn.head_dim)
    return Reading(
        reason, attn.dropout, dense, q, k, v, output, projection.latent_query, heads, attn.scaling
    )


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
