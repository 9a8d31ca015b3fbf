"""Patch of Aria's projector: learned queries attend to patches without a matrix of scores.

transformers calls ``nn.MultiheadAttention`` with ``need_weights=True`` and drops the weights: the
scores of all heads are formed, normalized and averaged for nothing. Keys pass two projections in a
row, and so do values. For many patches and without gradients the two weights are multiplied first.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.fallback import record_fallback
from vlm_fast.modules.direct_runs import Part, mlp_part
from vlm_fast.modules.fused_sequence import run_parts
from vlm_fast.modules.parameter_access.activation import activation_name
from vlm_fast.modules.parameter_access.module_tree import (
    derived,
    why_not_direct_tree,
    why_tree_dtypes_differ,
)
from vlm_fast.ops.argument_errors import wrong_type, wrong_value
from vlm_fast.patching.class_swap import is_class
from vlm_fast.patching.patched_module import PatchedModule


class FusedAriaProjector(PatchedModule):
    """Replaces the forward of AriaProjector.

    If all patches are masked, attention gives zeros (before the bias of its output), not NaN.
    """

    same_call_signature = True

    query: Any
    cross_attn: Any
    layer_norm: Any
    feed_forward: Any
    patch_to_query_dict: dict[int, int]
    training: bool
    required_attributes: ClassVar[tuple[str, ...]] = (
        *(f"cross_attn.{name}" for name in (
            "num_heads", "q_proj", "k_proj", "v_proj", "linear", "dropout", "layer_norm",
            "layer_norm_kv", "multihead_attn.in_proj_weight", "multihead_attn.in_proj_bias",
            "multihead_attn.bias_k", "multihead_attn.dropout", "multihead_attn.out_proj",
        )),
        *(f"feed_forward.{name}" for name in ("linear_in", "act", "linear_out")),
    )  # fmt: skip

    def forward(self, key_value_states: Tensor, attn_mask: Tensor | None = None) -> Any:
        reason = self.why_not()
        x = key_value_states
        reason = reason or why_tree_dtypes_differ(self, x)  # type: ignore[arg-type]
        if x.shape[1] not in self.patch_to_query_dict:
            reason = "its own forward names the numbers of patches it takes"
        if reason is not None:
            record_fallback(type(self).__name__, reason)
            return super().forward(x, attn_mask)  # type: ignore[misc]
        if attn_mask is not None:
            _check(attn_mask, x)
        attn, multihead = self.cross_attn, self.cross_attn.multihead_attn
        queries = self.query[: self.patch_to_query_dict[x.shape[1]]].unsqueeze(0)
        weights, biases = multihead.in_proj_weight.chunk(3), multihead.in_proj_bias.chunk(3)
        q = F.linear(attn.q_proj(attn.layer_norm(queries)), weights[0], biases[0])
        k, v = (
            _projected(attn.layer_norm_kv(x), linear, weight, bias)
            for linear, weight, bias in zip(
                (attn.k_proj, attn.v_proj), weights[1:], biases[1:], strict=True
            )
        )
        q, k, v = (t.unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        attended = ops.cross_attention(
            q.expand(x.shape[0], -1, -1, -1), k, v,
            key_mask=None if attn_mask is None else ~attn_mask,
        )  # fmt: skip
        found = attn.linear(multihead.out_proj(attended.transpose(1, 2).flatten(2)))
        return run_parts(type(self).__name__, self.layer_norm(found), derived(self, _mlp_of))

    def why_not(self) -> str | None:
        attn, multihead = self.cross_attn, self.cross_attn.multihead_attn
        if self.training and (attn.dropout.p > 0 or multihead.dropout > 0):
            return "it has dropout"
        if multihead.in_proj_weight is None or multihead.bias_k is not None:
            return "its attention has other parameters than transformers gives it"
        return why_not_direct_tree(self, biases=False)  # type: ignore[arg-type]


def _mlp_of(projector: Any) -> tuple[Part]:
    ff = projector.feed_forward
    return (mlp_part((ff.linear_in, ff.act, ff.linear_out), "preactivation"),)


def _projected(normed: Tensor, linear: Any, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.linear(linear(normed), weight, bias)``.

    For many rows the two weights are multiplied first, so that the rows are multiplied only once.
    Multiplying the weights costs as much as multiplying as many rows as ``weight`` has.
    """
    rows = normed.numel() // max(normed.shape[-1], 1)
    if torch.is_grad_enabled() or linear.bias is not None or rows < 2 * weight.shape[0]:
        return F.linear(linear(normed), weight, bias)
    return F.linear(normed, weight @ linear.weight, bias)


def _check(mask: Tensor, x: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise wrong_type("patch(Aria)", "attn_mask", mask, "torch.bool, True where hidden")
    if mask.shape != x.shape[:2]:
        wanted = f"{tuple(x.shape[:2])}, one for each patch"
        raise wrong_value("patch(Aria)", "attn_mask", mask, wanted)


def recognise(module: nn.Module, **options: Any) -> tuple[()] | str | None:
    """Empty settings, a reason not to patch, or None for another class."""
    if not is_class(module, "aria", "AriaProjector"):
        return None
    projector: Any = module
    if activation_name(projector.feed_forward.act) is None:
        return f"{type(projector.feed_forward.act).__name__} is not known"
    return ()
