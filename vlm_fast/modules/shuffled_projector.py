"""Projectors with a pixel shuffle: Idefics3's and SmolVLM's, Llama 4's, and Mistral 3's."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.modules.fused_sequence import fused_mlp
from vlm_fast.modules.normed_mlp import normed_mlp
from vlm_fast.modules.parameter_access.activation import FunctionalActivation, activation_module
from vlm_fast.modules.parameter_access.norm import RMSNorm, shuffle_and_norm
from vlm_fast.modules.token_grid import grid_of
from vlm_fast.ops.argument_errors import check_tensor, wrong_value
from vlm_fast.ops.patch_blocks import rows_of_blocks


class PixelShuffleConnector(nn.Module):
    """Idefics3's and SmolVLM's connector: a pixel shuffle in one copy, and a linear without bias.

    Mirrors transformers' ``Idefics3Connector`` and ``SmolVLMConnector``, with their key
    ``modality_projection.proj.weight``.

    Args:
        in_features, out_features: widths of a patch and of the language model.
        factor: side of a block, in patches.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        factor: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.modality_projection = nn.Module()
        wide = in_features * factor**2
        self.modality_projection.proj = nn.Linear(wide, out_features, bias=False, **factory)
        self.factor = factor

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Shuffle and project ``x (batch, height * width, in_features)``.

        Args:
            x: row by row of the grid.
            height, width: of the grid, in tokens; that of a square by default.

        Returns:
            ``(batch, height * width / factor ** 2, out_features)``.

        Raises:
            TypeError: x is not a tensor.
            ValueError: the tokens do not form the grid, or the factor does not divide it.
        """
        proj: Any = self.modality_projection.proj
        check_tensor(type(self).__name__, "x", x)
        y: Tensor = proj(_shuffled(x, self.factor, height, width))
        return y


class PixelShuffleMLP(nn.Module):
    """Llama 4's adapter: a pixel shuffle in one copy, then twice a linear without bias and GELU.

    Mirrors transformers' ``Llama4VisionPixelShuffleMLP``, with its keys ``mlp.fc1.weight`` and
    ``mlp.fc2.weight``.

    Args:
        in_features, hidden_features, out_features: widths of a patch, between the linears, and of
            the result.
        factor: side of a block, in patches.
        dropout: probability of dropout between the linears, in training.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        factor: int = 2,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype, "bias": False}
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(in_features * factor**2, hidden_features, **factory)
        self.mlp.fc2 = nn.Linear(hidden_features, out_features or hidden_features, **factory)
        self.factor, self.dropout = factor, nn.Dropout(dropout)

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Shuffle and project ``x (batch, height * width, in_features)``.

        Args:
            x: row by row of the grid.
            height, width: of the grid, in tokens; that of a square by default.

        Returns:
            ``(batch, height * width / factor ** 2, out_features)``.

        Raises:
            TypeError: x is not a tensor.
            ValueError: the tokens do not form the grid, or the factor does not divide it.
        """
        check_tensor(type(self).__name__, "x", x)
        x = _shuffled(x, self.factor, height, width)
        if self.training and self.dropout.p > 0:
            fc1, _, fc2 = _children_of_mlp(self)
            h = fc2(self.dropout(nn.functional.gelu(fc1(x))))
        else:
            h = fused_mlp(self, x, _children_of_mlp, "preactivation")
        return nn.functional.gelu(h)


class RaggedMergerProjector(nn.Module):
    """Mistral 3's projector for images of any size: norm, merge of patches, linear, MLP.

    Mirrors transformers' ``Mistral3MultiModalProjector`` (and ``LightOnOcrMultiModalProjector``),
    with its keys: ``norm``, ``patch_merger.merging_layer``, ``linear_1``, ``linear_2``. Norm
    and merge of all images are one pass.

    Args:
        in_features, out_features: widths of a patch and of the language model.
        factor: side of a block, in patches; rows and columns that fill no block are dropped.
        bias: whether ``linear_1`` and ``linear_2`` have a bias.
        activation: see `MLPProjector`.
        eps: of the norm.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        factor: int = 2,
        bias: bool = False,
        activation: str = "gelu",
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        wide = in_features * factor**2
        self.norm = RMSNorm(in_features, eps, **factory)
        self.patch_merger = nn.Module()
        self.patch_merger.merging_layer = nn.Linear(wide, in_features, bias=False, **factory)
        self.linear_1 = nn.Linear(in_features, out_features, bias=bias, **factory)
        self.act = activation_module(activation)
        self.linear_2 = nn.Linear(out_features, out_features, bias=bias, **factory)
        self.factor = factor

    def forward(self, x: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Merge and project ``x (tokens, in_features)`` to ``(merged tokens, out_features)``.

        Args:
            x: the patches of all images, image after image, each row by row.
            grids: height and width of each image, in patches.

        Raises:
            TypeError: x is not a tensor.
            ValueError: the number of rows of x is not that of the cells of all grids.
        """
        name = type(self).__name__
        check_tensor(name, "x", x)
        cells = sum(h * w for h, w in grids)
        if x.ndim != 2 or x.shape[0] != cells:
            raise wrong_value(name, "x", x, f"({cells}, features), the cells of the grids")
        index = rows_of_blocks(grids, self.factor, x.device)
        parts, merging = normed_mlp(self, _children_of_merger), self.patch_merger.merging_layer
        x = shuffle_and_norm(
            name, x, parts.norm, parts.parameters, factor=self.factor, norm_after=False,
            layout="channel", index=index,
        )  # fmt: skip
        return parts.mlp(name, merging(x))  # type: ignore[operator]


def _children_of_mlp(owner: Any) -> tuple[Any, ...]:
    return owner.mlp.fc1, FunctionalActivation("gelu"), owner.mlp.fc2


_children_of_merger = attrgetter("norm", "linear_1", "act", "linear_2")


def _shuffled(x: Tensor, factor: int, height: int | None, width: int | None) -> Tensor:
    height, width = grid_of("pixel shuffle", x, height, width)
    return ops.pixel_shuffle_norm(x, height=height, width=width, factor=factor)
