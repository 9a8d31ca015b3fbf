"""Projectors that pool the grid they are given: Gemma 3's, and LLaVA's MLP with fewer tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.modules.mlp_projector import MLPProjector
from vlm_fast.modules.parameter_access.norm import RMSNorm, shuffle_and_norm
from vlm_fast.modules.token_grid import grid_of
from vlm_fast.ops.argument_errors import wrong_value

COMMUTING = ("avg", "bilinear")


class PooledMLPProjector(MLPProjector):
    """`MLPProjector` whose result is pooled, and so has fewer tokens: before its second linear.

    Means and bilinear weights sum to 1, so that ``pool(linear_2(h))`` is ``linear_2(pool(h))``,
    bias and all: at a stride of 2 that linear has a quarter of the rows. Mirrors transformers'
    ``PerceptionLMMultiModalProjector`` ("avg"), and LLaVA-OneVision's projector with the pooling of
    its videos ("bilinear"); LLaVA's keys ``linear_1`` and ``linear_2``.

    Args:
        in_features, hidden_features, out_features, others: as of `MLPProjector`.
        stride, mode: as of `vlm_fast.ops.spatial_pool`, but no "max", which does not commute.

    Shapes: ``(batch, height * width, in_features)`` to ``(batch, pooled, out_features)``; square
    unless ``height`` and ``width`` say otherwise.

    Raises:
        ValueError: ``mode`` is another; by the call, as of `vlm_fast.ops.spatial_pool`.
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
        height, width = grid_of(type(self).__name__, x, height, width)
        pool = dict(height=height, width=width, stride=self.stride)
        return pooled_mlp(x, self.linear_1, self.act, self.linear_2, mode=self.mode, **pool)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, mode={self.mode!r}"


class PooledNormProjector(nn.Module):
    """Gemma 3's projector: a mean of windows, RMSNorm and a matrix, token by token.

    Mirrors transformers' ``Gemma3MultiModalProjector`` with its keys, ``mm_soft_emb_norm.weight``
    and ``mm_input_projection_weight`` (of ``(in, out)``), without its copies with channels first.

    Args:
        in_features, out_features: of the vision tower and of the language model.
        stride: the side of a window.
        eps: of the norm.

    Shapes: ``(batch, height * width, in_features)`` to ``(batch, pooled, out_features)``; square
    unless ``height`` and ``width`` say otherwise.

    Raises:
        ValueError: by the call, as of `vlm_fast.ops.spatial_pool`.
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
        height, width = grid_of(type(self).__name__, x, height, width)
        normed = pooled_norm(
            type(self).__name__, x, self.mm_soft_emb_norm, height, width, self.stride
        )
        return times_matrix(normed, self.mm_input_projection_weight)


def pooled_mlp(
    x: Tensor, linear_1: nn.Module, act: nn.Module, linear_2: nn.Module, *,
    height: int, width: int, stride: int, mode: str = "avg",
) -> Tensor:  # fmt: skip
    """``linear_2(pool(act(linear_1(x))))``."""
    h = act(linear_1(x))
    y: Tensor = linear_2(ops.spatial_pool(h, height=height, width=width, mode=mode, stride=stride))
    return y


def times_matrix(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix``, the matrix being ``(in, out)`` as Gemma 3's is."""
    if x.is_cpu and x.dtype is not torch.float32:
        # Of two matrices in rows ATen's product in half precision takes 25 times as long.
        x = x.mT.contiguous().mT
    return x @ matrix


def pooled_norm(
    owner: str, x: Tensor, norm: nn.Module, height: int, width: int, stride: int
) -> Tensor:
    """Means of windows ``(batch, pooled, features)``, normed."""
    x = ops.spatial_pool(x, height=height, width=width, stride=stride)
    return shuffle_and_norm(owner, x, norm, height=x.shape[-2], width=1, factor=1, norm_after=False)
