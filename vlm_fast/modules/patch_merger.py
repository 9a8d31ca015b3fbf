"""Blocks of patches merged into one token each and projected, as Qwen-VL and InternVL do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast.modules.fused_sequence import fused_mlp
from vlm_fast.modules.parameter_access.activation import activation_module
from vlm_fast.modules.parameter_access.norm import RMSNorm, shuffle_and_norm
from vlm_fast.modules.token_grid import grid_of
from vlm_fast.ops.argument_errors import check_tensor, wrong_value

NORMS = {"layer": nn.LayerNorm, "rms": RMSNorm}


class PatchMerger(nn.Module):
    """Norm, ``factor x factor`` patches side by side, linear, GELU, linear: Qwen-VL's merger.

    Mirrors transformers' ``PatchMerger`` of Qwen2-VL, ``Qwen2_5_VLPatchMerger`` and
    ``Qwen3VLVisionPatchMerger``, through `vlm_fast.ops.pixel_shuffle_norm` and `vlm_fast.ops.mlp`.

    Args:
        in_features: of a patch.
        out_features: of the language model.
        hidden_features: between the linears, ``factor ** 2 * in_features`` unless given.
        factor: patches along a side of a block.
        norm: "layer" (Qwen2-VL, Qwen3-VL) or "rms" (Qwen2.5-VL).
        norm_after: whether merged tokens are normed (Qwen3-VL's deepstack), or their patches.
        keys: parameter names as in "qwen2" (``ln_q``, ``mlp.0``, ``mlp.2``) or "qwen3" (``norm``,
            ``linear_fc1``, ``linear_fc2``).
        eps: of the norm.

    Shapes: ``(tokens, in_features)``, the tokens of each block consecutive as Qwen's processors
    leave them, to ``(tokens / factor ** 2, out_features)``.

    Raises:
        ValueError: ``norm`` or ``keys`` is unknown; the tokens make no whole blocks.
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
        """``window_index``: Qwen2.5-VL's, int, one for each block; x comes in its order, and blocks
        are put back where they belong as they are read."""
        check_tensor(type(self).__name__, "x", x)
        index = None
        if window_index is not None:
            index = blocks_in_place(window_index, self.factor)
        return merge_patches(type(self).__name__, x, self, self.factor, self.norm_after, index)


class PixelShuffleProjector(nn.Module):
    """InternVL's projector with the pixel shuffle before it, its first norm reading the grid.

    Mirrors ``InternVLModel.pixel_shuffle`` and ``InternVLMultiModalProjector`` of transformers,
    with the latter's keys: ``layer_norm``, ``linear_1``, ``linear_2``.

    Args:
        in_features: of a patch.
        out_features: of the language model.
        factor: patches along a side of a block.
        activation: as of `MLPProjector`.
        eps: of the norm.

    Shapes: ``(batch, height * width, in_features)`` to ``(batch, height * width / factor ** 2,
    out_features)``; square unless ``height`` and ``width`` say otherwise.

    Raises:
        ValueError: the tokens make no such grid, or the factor does not divide it.
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
        height, width = grid_of(type(self).__name__, x, height, width)
        name = type(self).__name__
        x = shuffle_and_norm(
            name, x, self.layer_norm, height=height, width=width, factor=self.factor,
            norm_after=True,
        )  # fmt: skip
        return fused_mlp(name, x, self.linear_1, self.act, self.linear_2, "preactivation")


def merge_patches(
    owner: str,
    x: Tensor,
    merger: Any,
    factor: int,
    norm_after: bool,
    index: Tensor | None = None,
    saved: str = "preactivation",
) -> Tensor:
    """What a merger with the children of `PatchMerger` does to tokens ``(..., in_features)``."""
    norm, linear_1, act, linear_2 = children_of(merger)
    x = shuffle_and_norm(
        owner, x.reshape(-1, factor**2, x.shape[-1]), norm, height=factor, width=factor,
        factor=factor, norm_after=norm_after, index=index,
    )  # fmt: skip
    x = x.flatten(0, -2)
    return fused_mlp(owner, x, linear_1, act, linear_2, saved)


def children_of(merger: Any) -> tuple[nn.Module, ...]:
    """Norm, linear, activation and linear, by either of Qwen's names."""
    if hasattr(merger, "ln_q"):
        return merger.ln_q, *merger.mlp
    return merger.norm, merger.linear_fc1, merger.act_fn, merger.linear_fc2


def blocks_in_place(window_index: Tensor, factor: int) -> Tensor:
    """The rows of each block, ``(blocks, factor ** 2)``, of tokens in the order of the windows."""
    place = torch.empty_like(window_index)
    place[window_index] = torch.arange(window_index.shape[0], device=window_index.device).to(
        window_index.dtype
    )
    positions = torch.arange(factor**2, device=place.device, dtype=place.dtype)
    return place.unsqueeze(1) * factor**2 + positions
