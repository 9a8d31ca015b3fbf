"""Which norm does a module compute, and may an op read its parameters instead of calling it?"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.fallback import record_fallback
from vlm_fast.modules.parameter_access.dtypes import is_common_dtype, why_dtypes_differ
from vlm_fast.modules.parameter_access.linear import why_not_readable
from vlm_fast.modules.parameter_access.module_calls import why_call_does_more

# Classes of transformers, by name. Those of Llama's form round to the input's dtype before the
# weight; those of Gemma's form multiply by 1 + weight in float32.
LLAMA_RMS_NORMS = (
    "IdeficsRMSNorm", "Idefics2RMSNorm", "MllamaTextRMSNorm", "Qwen2RMSNorm", "Qwen2_5_VLRMSNorm",
    "Qwen2_5OmniRMSNorm", "Exaone4_5_RMSNorm", "Mistral3RMSNorm", "LightOnOcrRMSNorm",
)  # fmt: skip
GEMMA_RMS_NORMS = ("Gemma3RMSNorm", "T5Gemma2RMSNorm")


class NormParameters(NamedTuple):
    """A norm as `vlm_fast.ops.pixel_shuffle_norm` takes it.

    Attributes:
        kind: "layer", "rms" (Llama's form) or "gemma" (Gemma's form).
        weight, bias: ``(features,)``; the bias may be None.
        eps: added to the variance or mean square.
        keeps_dtype: whether the result has the input's dtype although the weight is float32.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None
    eps: float
    keeps_dtype: bool


class RMSNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467) over the last dimension, in Llama's or in Gemma's form.

    Llama's form rounds to the input's dtype before it multiplies by the weight. Gemma's form
    multiplies by ``1 + weight`` in float32 and rounds once.

    Args:
        features: size of the last dimension.
        eps: added to the mean square.
        unit_offset: use Gemma's form.
    """

    def __init__(
        self,
        features: int,
        eps: float = 1e-6,
        *,
        unit_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        initial = torch.zeros if unit_offset else torch.ones
        self.weight = nn.Parameter(initial(features, device=device, dtype=dtype))
        self.eps, self.unit_offset = eps, unit_offset

    def forward(self, x: Tensor) -> Tensor:
        """``(..., features)`` to the same shape and dtype.

        Raises:
            TypeError, ValueError: as `vlm_fast.ops.pixel_shuffle_norm`.
        """
        return ops.pixel_shuffle_norm(
            x.unsqueeze(-2), self.weight, height=1, width=1, factor=1, norm=_own_kind(self),
            eps=self.eps,
        ).squeeze(-2)  # fmt: skip


def _own_kind(norm: RMSNorm) -> str:
    return "gemma" if norm.unit_offset else "rms"


def shuffle_and_norm(
    owner: str,
    x: Tensor,
    norm: nn.Module,
    found: NormParameters | str,
    *,
    height: int = 0,
    width: int = 0,
    factor: int,
    norm_after: bool,
    index: Tensor | None = None,
    layout: str = "patch",
) -> Tensor:
    """`vlm_fast.ops.pixel_shuffle_norm` with the parameters of ``norm``.

    The norm is called as a module instead if its parameters cannot be read directly. ``owner`` is
    the name under which that fallback is recorded, ``found`` what `norm_parameters` gives for the
    norm; the other arguments are those of the op.
    """
    grid: dict[str, Any] = dict(height=height, width=width, factor=factor, layout=layout)
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


def norm_parameters(norm: nn.Module) -> NormParameters | str:
    """The kind and parameters of a norm, or the reason why it must be called as a module."""
    kind, eps = norm_kind(norm)
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
    """Why `shuffle_and_norm` would call ``norm`` as a module next time, or None.

    ``linear``: the linear that reads the result, whose dtype must then fit.
    """
    found = norm_parameters(norm)
    if isinstance(found, str):
        return f"norm: {found}"
    if found.keeps_dtype or type(linear) is not nn.Linear:
        return _why_not_dtype(found, norm, None)
    return why_dtypes_differ(None, norm=norm, linear=linear)


def _why_not_dtype(found: NormParameters, norm: nn.Module, x: Tensor | None) -> str | None:
    dtype = found.weight.dtype
    if (found.keeps_dtype and dtype is torch.float32) or is_common_dtype(x, dtype):
        return None
    reason = why_dtypes_differ(x, norm=norm)
    if reason is None and x is not None and dtype not in (x.dtype, torch.float32):
        return f"norm is {dtype}, its input {x.dtype}, which autocast leaves alone"
    return reason


def norm_kind(norm: Any) -> tuple[str | None, float]:
    """The kind of a norm, see `NormParameters`, and its eps; None for an unknown class."""
    if type(norm) is nn.LayerNorm:
        return "layer", norm.eps
    if type(norm) is RMSNorm:
        return _own_kind(norm), norm.eps
    kind = type(norm)
    if kind.__module__.startswith("transformers.models."):
        if kind.__name__ in LLAMA_RMS_NORMS:
            return "rms", norm.variance_epsilon
        if kind.__name__ in GEMMA_RMS_NORMS:
            return "gemma", norm.eps
    return None, 0.0
