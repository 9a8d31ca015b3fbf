"""Projectors that pool a grid of tokens: Gemma 3's, and LLaVA's MLP with pooling inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.modules.mlp_projector import MLPProjector
from vlm_fast.modules.normed_mlp import NormedMLP, normed_mlp
from vlm_fast.modules.parameter_access.norm import RMSNorm, shuffle_and_norm
from vlm_fast.modules.token_grid import grid_of
from vlm_fast.ops.argument_errors import wrong_value

COMMUTING = ("avg", "bilinear")


class PooledMLPProjector(MLPProjector):
    """`MLPProjector` followed by pooling, computed as pooling before the second linear.

    Means and bilinear weights sum to 1, so ``pool(linear_2(h))`` equals ``linear_2(pool(h))``, with
    the bias too. At a stride of 2 that linear multiplies a quarter of the rows.

    Mirrors transformers' ``PerceptionLMMultiModalProjector`` ("avg"), and LLaVA-OneVision's
    projector with the pooling of video frames ("bilinear"), with LLaVA's keys ``linear_1`` and
    ``linear_2``.

    Args:
        in_features, hidden_features, out_features, bias, activation: see `MLPProjector`.
        stride, mode: see `vlm_fast.ops.spatial_pool`; "max" does not commute with a linear.

    Raises:
        ValueError: ``mode`` is not "avg" or "bilinear"; ``activation`` is unknown.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        stride: int = 2,
        mode: str = "avg",
        bias: bool = True,
        activation: str = "gelu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features, hidden_features, out_features,
            bias=bias, activation=activation, device=device, dtype=dtype,
        )  # fmt: skip
        if mode not in COMMUTING:
            raise wrong_value(type(self).__name__, "mode", mode, f"one of {COMMUTING}")
        self.stride, self.mode = stride, mode

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Project ``x (batch, height * width, in_features)`` to ``(batch, pooled, out_features)``.

        Args:
            x: row by row of the grid.
            height, width: of the grid, in tokens; that of a square by default.

        Raises:
            TypeError, ValueError: as `vlm_fast.ops.spatial_pool`; or x comes from a `TokenMerger`.
        """
        height, width = grid_of(type(self).__name__, x, height, width)
        pool = dict(height=height, width=width, stride=self.stride)
        return pooled_mlp(x, self.linear_1, self.act, self.linear_2, mode=self.mode, **pool)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, mode={self.mode!r}"


class PooledNormProjector(nn.Module):
    """Gemma 3's projector (arXiv 2503.19786): mean of windows, RMSNorm, matrix product.

    Mirrors transformers' ``Gemma3MultiModalProjector`` with its keys ``mm_soft_emb_norm.weight``
    and ``mm_input_projection_weight`` (shape ``(in, out)``), without copies with channels first.

    Args:
        in_features, out_features: widths of the vision encoder and of the language model.
        stride: side of a window, in tokens.
        eps: of the norm.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        stride: int = 4,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        matrix = torch.empty(in_features, out_features, device=device, dtype=dtype)
        self.mm_input_projection_weight = nn.Parameter(matrix.normal_(std=in_features**-0.5))
        self.mm_soft_emb_norm = RMSNorm(
            in_features, eps, unit_offset=True, device=device, dtype=dtype
        )
        self.stride = stride

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Project ``x (batch, height * width, in_features)`` to ``(batch, pooled, out_features)``.

        Args:
            x: row by row of the grid.
            height, width: of the grid, in tokens; that of a square by default.

        Raises:
            TypeError, ValueError: as `vlm_fast.ops.spatial_pool`; or x comes from a `TokenMerger`.
        """
        height, width = grid_of(type(self).__name__, x, height, width)
        normed = pooled_norm(self, x, height, width, self.stride, normed_mlp(self, norm_of))
        return times_matrix(normed, self.mm_input_projection_weight)


def pooled_mlp(
    x: Tensor, linear_1: nn.Module, act: nn.Module, linear_2: nn.Module, *,
    height: int, width: int, stride: int, mode: str = "avg",
) -> Tensor:  # fmt: skip
    """``linear_2(pool(act(linear_1(x))))`` of ``x (batch, height * width, in_features)``."""
    h = act(linear_1(x))
    y: Tensor = linear_2(ops.spatial_pool(h, height=height, width=width, mode=mode, stride=stride))
    return y


def times_matrix(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix`` of ``x (batch, tokens, in)`` and ``matrix (in, out)``."""
    if x.is_cpu and x.dtype is not torch.float32:
        # ATen's half-precision product of two row-major matrices takes 25 times as long.
        x = x.mT.contiguous().mT
    return x @ matrix


def pooled_norm(
    owner: Any, x: Tensor, height: int, width: int, stride: int, parts: NormedMLP
) -> Tensor:
    """The means of windows ``(batch, pooled, features)``, then the norm of ``owner``.

    See `SpatialPool`. ``parts``: the norm.
    """
    x = ops.spatial_pool(x, height=height, width=width, stride=stride)
    return shuffle_and_norm(
        type(owner).__name__, x, parts.norm, parts.parameters,
        height=x.shape[-2], width=1, factor=1, norm_after=False,
    )  # fmt: skip


def norm_of(projector: Any) -> tuple[nn.Module]:
    """The norm of a `PooledNormProjector`, for `normed_mlp`."""
    return (projector.mm_soft_emb_norm,)
