"""Patch of Aya Vision's and Cohere 2 Vision's projectors: a pixel shuffle and a gated MLP."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.fallback import record_fallback
from vlm_fast.modules.normed_mlp import normed_mlp
from vlm_fast.modules.parameter_access.activation import activation_name, why_not_activation
from vlm_fast.modules.parameter_access.dtypes import has_other_input, why_dtypes_differ
from vlm_fast.modules.parameter_access.linear import why_not_direct
from vlm_fast.modules.parameter_access.norm import (
    NormParameters,
    norm_parameters,
    shuffle_and_norm,
    why_not_direct_norm,
)
from vlm_fast.modules.parameter_access.remembered import ask_once, recall, remember_call
from vlm_fast.modules.token_grid import side_of_square
from vlm_fast.ops.autocast import autocast_device
from vlm_fast.ops.prepared_call import PreparedCall
from vlm_fast.patching.class_swap import is_class
from vlm_fast.patching.models.pixel_shuffle import side_of
from vlm_fast.patching.patched_module import PatchedModule

GATED = {
    "aya_vision": "AyaVisionMultiModalProjector",
    "cohere2_vision": "Cohere2VisionMultiModalProjector",
}


class DirectCalls(NamedTuple):
    """The calls of a projector whose parameters are read, for grids of one side.

    Attributes:
        merged: the side of the grid of merged tokens.
        shuffle, norm: the pixel shuffle with its norm's parameters.
        first, second: weights and biases of the linears.
        gated: the gate and the second linear.
    """

    merged: int
    shuffle: PreparedCall
    norm: tuple[Tensor | None, Tensor | None]
    first: tuple[Tensor, Tensor | None]
    gated: PreparedCall
    second: tuple[Tensor, Tensor | None]


_CALLS = "_direct_calls"  # where the calls are stored, by the side of their grid


class FusedGatedProjector(PatchedModule):
    """Replaces the forward of AyaVision's and Cohere2Vision's MultiModalProjector.

    Pixel shuffle and norm (if there is one) are one pass; ``linear_2(act(gate) * x)`` is one op.
    """

    same_call_signature = True

    downsample_factor: int
    linear_1: Any
    act: nn.Module
    linear_2: Any

    remembered_forward: ClassVar[Any] = staticmethod(lambda self, x: _remembered_calls(self, x))

    def forward(self, image_features: Tensor) -> Tensor:
        x, factor, name = image_features, self.downsample_factor, type(self).__name__
        side = side_of(x, factor)
        if side is None:
            record_fallback(name, "its grid is not a square that the factor divides")
            return super().forward(x)  # type: ignore[misc]
        norm: Any = getattr(self, "layernorm", None)
        grid: dict[str, Any] = dict(height=side, width=side, factor=factor)
        if norm is None:
            x = ops.pixel_shuffle_norm(x, **grid)
        else:
            parts = normed_mlp(self, lambda projector: (projector.layernorm,))
            x = shuffle_and_norm(name, x, norm, parts.parameters, norm_after=True, **grid)
        z, last = self.linear_1(x), self.linear_2
        reason = self._why_not_gated() or why_dtypes_differ(z, linear_2=last)
        y: Tensor
        if reason is None:
            activation = activation_name(self.act) or ""
            y = ops.act_linear(z, last.weight, last.bias, activation=activation, gated=True)
            if side not in (recall(self, _CALLS) or ()):
                self._remember(side)
        else:
            record_fallback(name, reason)
            x, gate = z.chunk(2, dim=-1)
            y = last(self.act(gate) * x)
        return y.unflatten(1, (side // factor, side // factor))

    def _why_not_gated(self) -> str | None:
        def asked() -> str | None:
            for name, why_not in (("act", why_not_activation), ("linear_2", why_not_direct)):
                reason = why_not(getattr(self, name))
                if reason is not None:
                    return f"{name}: {reason}"
            return None

        return ask_once(self, asked, lambda: (self.act, self.linear_2))

    def _remember(self, side: int) -> None:
        """Store the calls for grids of this side, if all parameters can be read directly."""
        norm: Any = getattr(self, "layernorm", None)
        read = [self.linear_1, self.act, self.linear_2]
        of_norm: Any = NormParameters("none", None, None, 0.0, True)  # type: ignore[arg-type]
        if norm is not None:
            of_norm, read = norm_parameters(norm), [*read, norm]
        dtypes = {p.dtype for module in read for p in module.parameters()}
        if isinstance(of_norm, str) or why_not_direct(self.linear_1) or len(dtypes) != 1:
            return
        calls = DirectCalls(
            side // self.downsample_factor,
            ops.pixel_shuffle_norm.prepared(
                height=side, width=side, factor=self.downsample_factor, norm=of_norm.kind,
                **({} if norm is None else {"norm_after": True, "eps": of_norm.eps}),
            ),
            (of_norm.weight, of_norm.bias), (self.linear_1.weight, self.linear_1.bias),
            ops.act_linear.prepared(activation=activation_name(self.act), gated=True),
            (self.linear_2.weight, self.linear_2.bias),
        )  # fmt: skip
        remember_call(self, _CALLS, side, calls, lambda: read)

    def why_not(self) -> str | None:
        norm = getattr(self, "layernorm", None)
        reason = None if norm is None else why_not_direct_norm(norm, self.linear_1)
        return reason or self._why_not_gated() or why_dtypes_differ(None, linear_2=self.linear_2)


def _remembered_calls(projector: Any, x: Any) -> Any:
    """The result by calls that are known to serve; otherwise NotImplemented."""
    known = recall(projector, _CALLS)
    if known is None or type(x) is not Tensor or x.ndim != 3:
        return NotImplemented
    side = side_of_square(x.shape[1])
    calls: DirectCalls | None = known.get(side)
    if calls is None or side**2 != x.shape[1] or has_other_input():
        return NotImplemented
    dtype = calls.first[0].dtype  # autocast leaves a norm in 16 bits alone
    casts = dtype is torch.float32 and torch.is_autocast_enabled(autocast_device(x))
    if x.dtype is not dtype and not casts:
        return NotImplemented
    y = calls.shuffle.if_known(x, *calls.norm, None)
    if y is NotImplemented:
        return y
    y = calls.gated.if_known(F.linear(y, *calls.first), *calls.second, casts=True)
    return y if y is NotImplemented else y.unflatten(1, (calls.merged, calls.merged))


def recognise(module: nn.Module, **options: Any) -> tuple[()] | None:
    """Empty settings for Aya's and Cohere 2's projectors, or None for another class."""
    return () if any(is_class(module, family, name) for family, name in GATED.items()) else None
