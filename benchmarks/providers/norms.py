"""Norms of Liger and Apex; ATen does the rest of our ops before or after them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from vlm_fast.benchmarks.providers.peer import Peer, Unavailable
from vlm_fast.ops import gated_add, pixel_shuffle_norm

Norm = Callable[[Tensor, Tensor, Any, float], Tensor]


def liger_layer() -> Norm:
    ops: Any = importlib.import_module("liger_kernel.ops.layer_norm")
    return lambda x, weight, bias, eps: ops.LigerLayerNormFunction.apply(x, weight, bias, eps)


def liger_rms() -> Norm:
    ops: Any = importlib.import_module("liger_kernel.ops.rms_norm")
    # Not in place, because the gradient of the residual is read again.
    return lambda x, weight, bias, eps: ops.LigerRMSNormFunction.apply(
        x, weight, eps, 0.0, "llama", False
    )


def apex_layer() -> Norm:
    ops: Any = importlib.import_module("apex.normalization.fused_layer_norm")
    return lambda x, weight, bias, eps: ops.fused_layer_norm_affine(
        x, weight, bias, x.shape[-1:], eps
    )


def added(library: Callable[[], Norm]) -> Callable[..., Any]:
    """``add_layer_norm``: the sum by ATen, then the library's norm."""

    def make(*args: Any, dropout: float = 0.0, eps: float = 1e-12) -> Callable[..., Any]:
        if dropout:
            raise Unavailable("drops other features than we do")
        normed = library()

        def call(
            x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor,
            x_bias: Tensor | None = None, seed: Tensor | None = None, **_: Any,
        ) -> Tensor:  # fmt: skip
            x = x if x_bias is None else x + x_bias
            return normed((x + residual).to(residual.dtype), weight, bias, eps)

        return call

    return make


def gated(kind: str, library: Callable[[], Norm]) -> Callable[..., Any]:
    """``gated_add_norm``: the gate by ATen, then the library's norm."""

    def make(*args: Any, norm: str = "layer", eps: float = 1e-5) -> Callable[..., Any]:
        if norm != kind:
            raise Unavailable(f"is a {kind} norm; this is a {norm} norm")
        normed = library()

        def call(
            x: Tensor, y: Tensor, gate: Tensor, weight: Tensor,
            bias: Tensor | None = None, row_mask: Tensor | None = None, **_: Any,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            h = gated_add.reference(x, y, gate, row_mask)
            return h, normed(h, weight, bias, eps)

        return call

    return make


def shuffled(kind: str, library: Callable[[], Norm]) -> Callable[..., Any]:
    """``pixel_shuffle_norm``: the shuffle by ATen, and the library's norm before or after it."""

    def make(*args: Any, norm: str = "none", **options: Any) -> Callable[..., Any]:
        if norm != kind:
            raise Unavailable(f"is a {kind} norm; this is: {norm}")
        normed, eps = library(), options.get("eps", 1e-5)

        def call(
            x: Tensor, weight: Tensor, bias: Tensor | None = None, index: Tensor | None = None,
            **options: Any,
        ) -> Tensor:  # fmt: skip
            after = options.pop("norm_after", True)
            options["norm"] = "none"
            x = x if after else normed(x, weight, bias, eps)
            blocks = pixel_shuffle_norm.reference(x, None, None, index, **options)
            return normed(blocks, weight, bias, eps) if after else blocks

        return call

    return make


LIGER: dict[str, Any] = dict(package="liger_kernel", cuda_only=True)
APEX: dict[str, Any] = dict(package="apex", cuda_only=True)

PEERS = (
    Peer("Liger", "add_layer_norm", added(liger_layer), **LIGER),
    Peer("Apex", "add_layer_norm", added(apex_layer), **APEX),
    Peer("Liger (LayerNorm)", "gated_add_norm", gated("layer", liger_layer), **LIGER),
    Peer("Liger (RMSNorm)", "gated_add_norm", gated("rms", liger_rms), **LIGER),
    Peer("Liger (LayerNorm)", "pixel_shuffle_norm", shuffled("layer", liger_layer), **LIGER),
    Peer("Liger (RMSNorm)", "pixel_shuffle_norm", shuffled("rms", liger_rms), **LIGER),
)
