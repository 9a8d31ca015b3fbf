"""May a norm's parameters be read directly, instead of calling it? And which norm is it?"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.fallback import record_fallback
from vlm_fast.modules.parameter_access.dtypes import why_dtypes_differ
from vlm_fast.modules.parameter_access.linear import why_call_does_more, why_not_readable
from vlm_fast.modules.parameter_access.module_tree import rms_eps

_GEMMA = ("Gemma3RMSNorm", "T5Gemma2RMSNorm")


class NormParameters(NamedTuple):
    """Its name for `vlm_fast.ops.pixel_shuffle_norm`, and what that needs of it.

    ``keeps_dtype``: whether its result has the dtype of its input when its weight is float32.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None
    eps: float
    keeps_dtype: bool


class RMSNorm(nn.Module):
    """Llama's RMSNorm (arXiv 1910.07467), rounded to the input's dtype before the weight.

    Args:
        features: what is normed together.
        eps: added to the mean square.
    """

    def __init__(
        self,
        features: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _normed(x, self.weight, "rms", self.eps)


class GemmaRMSNorm(nn.Module):
    """Gemma's RMSNorm: times ``1 + weight``, in fp32, and rounded once.

    Args:
        features: what is normed together.
        eps: added to the mean square.
    """

    def __init__(
        self,
        features: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _normed(x, self.weight, "gemma", self.eps)


def _normed(x: Tensor, weight: Tensor, kind: str, eps: float) -> Tensor:
    return ops.pixel_shuffle_norm(
        x.unsqueeze(-2), weight, height=1, width=1, factor=1, norm=kind, eps=eps
    ).squeeze(-2)


def shuffle_and_norm(
    owner: str,
    x: Tensor,
    norm: nn.Module,
    *,
    height: int = 0,
    width: int = 0,
    factor: int,
    norm_after: bool,
    index: Tensor | None = None,
    layout: str = "patch",
) -> Tensor:
    """`vlm_fast.ops.pixel_shuffle_norm` with the parameters of ``norm``; where these may not be
    read the norm is called."""
    grid: dict[str, Any] = dict(height=height, width=width, factor=factor, layout=layout)
    found = norm_parameters(norm)
    reason = f"norm: {found}" if isinstance(found, str) else _why_not_dtype(found, norm, x)
    if isinstance(found, str) or reason is not None:
        record_fallback(owner, str(reason))
        if norm_after:
            return norm(ops.pixel_shuffle_norm(x, None, None, index, **grid))
        return ops.pixel_shuffle_norm(norm(x), None, None, index, **grid)
    return ops.pixel_shuffle_norm(
        x, found.weight, found.bias, index,
        norm=found.kind, norm_after=norm_after, eps=found.eps, **grid,
    )  # fmt: skip


_OWN: dict[type[nn.Module], str] = {RMSNorm: "rms", GemmaRMSNorm: "gemma"}


def norm_parameters(norm: nn.Module) -> NormParameters | str:
    """What a norm does, or the reason why it must be called."""
    kind, eps = _kind(norm)
    if kind is None:
        return f"{type(norm).__name__} is not a norm the kernels know"
    reason = why_call_does_more(norm)
    if reason is not None:
        return reason
    for name, parameter in norm._parameters.items():
        if parameter is None:
            if name == "weight":
                return "it has no weight"
            continue
        reason = why_not_readable(name, parameter)
        if reason is not None:
            return reason
    weight, bias = norm._parameters["weight"], norm._parameters.get("bias")
    if weight is None or weight.ndim != 1:
        return "its weight is not of one dimension"
    return NormParameters(kind, weight, bias, eps, kind == "gemma" or type(norm) is RMSNorm)


def why_not_direct_norm(norm: nn.Module, linear: nn.Module | None = None) -> str | None:
    """Why `merged`, and a linear that reads its result, would call the norm next; or None."""
    found = norm_parameters(norm)
    if isinstance(found, str):
        return f"norm: {found}"
    if found.keeps_dtype or type(linear) is not nn.Linear:
        return _why_not_dtype(found, norm, None)
    return why_dtypes_differ(None, norm=norm, linear=linear)


def _why_not_dtype(found: NormParameters, norm: nn.Module, x: Tensor | None) -> str | None:
    dtype = found.weight.dtype
    if found.keeps_dtype and dtype is torch.float32:
        return None
    reason = why_dtypes_differ(x, norm=norm)
    if reason is None and x is not None and dtype not in (x.dtype, torch.float32):
        return f"norm is {dtype}, its input {x.dtype}, which autocast leaves alone"
    return reason


def _kind(norm: nn.Module) -> tuple[str | None, float]:
    if type(norm) is nn.LayerNorm:
        return "layer", norm.eps
    if isinstance(norm, (RMSNorm, GemmaRMSNorm)) and type(norm) in _OWN:
        return _OWN[type(norm)], norm.eps
    eps = rms_eps(norm)
    if eps is not None:
        return "rms", eps
    kind = type(norm)
    if kind.__name__ in _GEMMA and kind.__module__.startswith("transformers.models."):
        return "gemma", norm.eps  # type: ignore[return-value]
    return None, 0.0
