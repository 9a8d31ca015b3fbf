"""Projectors that merge each block of patches into one token: Qwen-VL's and InternVL's."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast.modules.normed_mlp import normed_mlp
from vlm_fast.modules.parameter_access.activation import activation_module
from vlm_fast.modules.parameter_access.norm import RMSNorm
from vlm_fast.modules.token_grid import grid_of
from vlm_fast.ops.argument_errors import check_tensor, wrong_value

NORMS = {"layer": nn.LayerNorm, "rms": RMSNorm}


class PatchMerger(nn.Module):
    """Qwen-VL's patch merger (arXiv 2409.12191): norm, merge of patches, linear, GELU, linear.

    Mirrors transformers' ``PatchMerger`` of Qwen2-VL, ``Qwen2_5_VLPatchMerger`` and
    ``Qwen3VLVisionPatchMerger``, through `vlm_fast.ops.pixel_shuffle_norm` and `vlm_fast.ops.mlp`.

    Args:
        in_features: width of a patch.
        out_features: width of the language model.
        hidden_features: width between the linears; ``factor ** 2 * in_features`` by default.
        factor: side of a block, in patches.
        norm: "layer" (Qwen2-VL, Qwen3-VL) or "rms" (Qwen2.5-VL).
        norm_after: normalize merged tokens (Qwen3-VL's deepstack) instead of patches.
        keys: parameter names of "qwen2" (``ln_q``, ``mlp.0``, ``mlp.2``) or "qwen3" (``norm``,
            ``linear_fc1``, ``linear_fc2``).
        eps: of the norm.

    Raises:
        ValueError: ``norm`` or ``keys`` is unknown.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden_features: int | None = None,
        factor: int = 2,
        norm: str = "layer",
        norm_after: bool = False,
        keys: str = "qwen3",
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise wrong_value("PatchMerger", "norm", norm, f"one of {tuple(NORMS)}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        wide = in_features * factor**2
        normed = NORMS[norm](wide if norm_after else in_features, eps=eps, **factory)
        hidden = wide if hidden_features is None else hidden_features
        first = nn.Linear(wide, hidden, **factory)
        second = nn.Linear(hidden, out_features, **factory)
        if keys == "qwen2":
            self.ln_q, self.mlp = normed, nn.Sequential(first, nn.GELU(), second)
        elif keys == "qwen3":
            self.norm, self.linear_fc1, self.act_fn, self.linear_fc2 = (
                normed, first, nn.GELU(), second,
            )  # fmt: skip
        else:
            raise wrong_value("PatchMerger", "keys", keys, "'qwen2' or 'qwen3'")
        self.factor, self.norm_after = factor, norm_after

    def forward(self, x: Tensor, window_index: Tensor | None = None) -> Tensor:
        """Merge and project ``(tokens, in_features)`` to ``(tokens / factor ** 2, out_features)``.

        Args:
            x: patches; those of each block are consecutive, as Qwen's processors return them.
            window_index: int ``(blocks,)``, Qwen2.5-VL's order of blocks by attention window. If x
                is in that order, the result is in the original one.

        Raises:
            TypeError: x is not a tensor.
            ValueError: the tokens do not form whole blocks.
        """
        check_tensor(type(self).__name__, "x", x)
        index = None
        if window_index is not None:
            index = blocks_in_place(window_index, self.factor)
        parts = normed_mlp(self, children_of)
        return parts.merged(
            type(self).__name__, x, self.factor, norm_after=self.norm_after, index=index
        )


class PixelShuffleProjector(nn.Module):
    """InternVL's pixel shuffle and projector (arXiv 2404.16821): shuffle and norm are one pass.

    Mirrors ``InternVLModel.pixel_shuffle`` and ``InternVLMultiModalProjector`` of transformers,
    with the latter's keys ``layer_norm``, ``linear_1`` and ``linear_2``.

    Args:
        in_features: width of a patch.
        out_features: width of the language model.
        factor: side of a block, in patches.
        activation: see `MLPProjector`.
        eps: of the norm.

    Raises:
        ValueError: ``activation`` is unknown.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        factor: int = 2,
        activation: str = "gelu",
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        wide = in_features * factor**2
        self.layer_norm = nn.LayerNorm(wide, eps=eps, **factory)
        self.linear_1 = nn.Linear(wide, out_features, **factory)
        self.act = activation_module(activation)
        self.linear_2 = nn.Linear(out_features, out_features, **factory)
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
        height, width = grid_of(type(self).__name__, x, height, width)
        name, parts = type(self).__name__, normed_mlp(self, _children_of_projector)
        return parts.merged(
            name, x, self.factor, norm_after=True, height=height, width=width
        )  # fmt: skip


_children_of_projector = attrgetter("layer_norm", "linear_1", "act", "linear_2")


def children_of(merger: Any) -> tuple[nn.Module, ...]:
    """Norm, first linear, activation and second linear, by the names of Qwen2-VL or Qwen3-VL."""
    if hasattr(merger, "ln_q"):
        return merger.ln_q, *merger.mlp
    return merger.norm, merger.linear_fc1, merger.act_fn, merger.linear_fc2


def blocks_in_place(window_index: Tensor, factor: int) -> Tensor:
    """The rows ``(blocks, factor ** 2)`` of each block in original order; x is in window order."""
    place = torch.empty_like(window_index)
    place[window_index] = torch.arange(window_index.shape[0], device=window_index.device).to(
        window_index.dtype
    )
    positions = torch.arange(factor**2, device=place.device, dtype=place.dtype)
    return place.unsqueeze(1) * factor**2 + positions
