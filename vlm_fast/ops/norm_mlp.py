"""A norm, optionally a merge of patches, then two linear layers with an activation between."""

from __future__ import annotations

import functools
import operator
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from vlm_fast.kernels._activation import ACTIVATIONS
from vlm_fast.ops.declaration import Cost, op
from vlm_fast.ops.mlp import SAVED, mlp
from vlm_fast.ops.pixel_shuffle_norm import (
    MAX_FACTOR,
    NORMS,
    pixel_shuffle_norm,
    why_block_too_wide,
)

NOTHING = (None,) * 5  # in place of what pixel_shuffle_norm saves


@op(
    x="floating (..., tokens, features)",
    norm_weight="like x (features * factor ** (2 * norm_after))",
    norm_bias="like x (features * factor ** (2 * norm_after)) or None",
    weight_1="like x (hidden, features * factor ** 2)",
    bias_1="like x (hidden) or None",
    weight_2="like x (out, hidden)",
    bias_2="like x (out) or None",
    factor=f"int from 1 to {MAX_FACTOR}",
    norm=NORMS[1:],
    activation=ACTIVATIONS,
    saved=SAVED,
    where={
        "height >= 0 and height % factor == 0": "height: a multiple of the factor {factor}, or 0",
        "width >= 0 and width % factor == 0": "width: a multiple of the factor {factor}, or 0",
        "tokens == height * width if height or width else tokens % factor ** 2 == 0": (
            "x: (..., tokens, features) with {height} x {width} tokens, or whole blocks without a "
            "height and a width"
        ),
        "norm == 'layer' or norm_bias is None": "norm_bias: None, except for a LayerNorm",
    },
)
def norm_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight_1: Tensor,
    bias_1: Tensor | None,
    weight_2: Tensor,
    bias_2: Tensor | None,
    *,
    height: int = 0,
    width: int = 0,
    factor: int = 1,
    norm: str = "layer",
    norm_after: bool = True,
    eps: float = 1e-5,
    activation: str = "gelu",
    saved: str = "preactivation",
) -> Tensor:
    """Norm x, merge ``factor x factor`` patches into one token, and apply two linears.

    Mirrors ``InternVLMultiModalProjector``, ``Qwen2_5_VLPatchMerger`` and ``PatchMerger`` of
    transformers as one node of the autograd graph. It is `pixel_shuffle_norm` and then `mlp`, and
    computes in x's dtype under autocast too.

    Args:
        x: A grid of patches in row-major order, or blocks of consecutive patches.
        norm_weight: The weight of the norm, for a token, or for a merged token with ``norm_after``.
        norm_bias: The bias of a LayerNorm; other norms have none.
        height: Rows of the grid, a multiple of ``factor``. 0 for blocks of consecutive patches.
        width: Columns of the grid, a multiple of ``factor``. 0 for blocks of consecutive patches.
        factor: Patches along a side of a block; with 1 nothing is merged.
        norm: "layer", "rms" or "gemma", see `pixel_shuffle_norm`.
        norm_after: True to norm a merged token as a whole, False to norm each patch.
        eps: Added to the variance, or to the mean square.
        saved: What backward keeps, see `mlp`.

    Returns:
        ``(..., tokens / factor ** 2, out)``.
    """
    y = pixel_shuffle_norm.reference(
        x, norm_weight, norm_bias, None, **_grid(x, height, width, factor),
        norm=norm, norm_after=norm_after, eps=eps,
    )  # fmt: skip
    return mlp.reference(y, weight_1, bias_1, weight_2, bias_2, activation=activation, saved=saved)


def _grid(x: Tensor, height: int, width: int, factor: int) -> dict[str, Any]:
    """The grid of patches; blocks of consecutive patches are one column of blocks."""
    if height == 0:
        height, width = x.shape[-2] // factor, factor
    return {"height": height, "width": width, "factor": factor}


@norm_mlp.fallback_reason
def fallback_reason(x: Tensor, *tensors: Tensor | None, factor: int, **options: Any) -> str | None:
    return why_block_too_wide(x, factor)


norm_mlp.disables_autocast = True
_norm, _mlp = pixel_shuffle_norm._path, mlp._path
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


@functools.lru_cache
def _needs(needs_grad: Any) -> tuple[Any, Any]:
    """What the two ops need; of the norm None, if it needs no gradient."""
    of_norm, of_mlp = needs_grad[:3], needs_grad[3:]
    needs = _norm.needs_of((*of_norm, False), 0)
    return needs, _mlp.needs_of((True in of_norm, *of_mlp), 0)


def _is_view(height: int, norm: str) -> bool:
    """Whether the norm is ATen's LayerNorm and the merge of consecutive patches a view.

    On a stub GPU this takes the host 6 us less in forward and 15 us or more less in backward than
    our kernels.
    """
    return height == 0 and norm == "layer"


def _merged(x: Tensor, factor: int) -> Tensor:
    """x with each block of consecutive patches as one token."""
    if factor == 1:
        return x
    *leading, tokens, features = x.shape
    return x.reshape(*leading, tokens // factor**2, factor**2 * features)


@norm_mlp.forward
def forward(
    needs_grad, x, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2, *,
    height, width, factor, norm, eps, norm_after, activation, saved,
):  # fmt: skip
    of_norm, of_mlp = _needs(needs_grad)
    if _is_view(height, norm):
        given = _merged(x, factor) if norm_after else x
        y, mean, rstd = torch.native_layer_norm(
            given, [given.shape[-1]], norm_weight, norm_bias, eps
        )
        y = y if norm_after else _merged(y, factor)
        saved_by_norm = (x, None, norm_weight, mean, rstd)
    else:
        y, saved_by_norm = _norm.forward(
            of_norm, x, norm_weight, norm_bias, None, **_grid(x, height, width, factor),
            norm=norm, norm_after=norm_after, layout="patch", eps=eps,
        )  # fmt: skip
    result, saved_by_mlp = _mlp.forward(
        of_mlp, y, weight_1, bias_1, weight_2, bias_2, activation=activation, saved=saved
    )
    return result, (*(saved_by_norm if True in of_norm else NOTHING), *saved_by_mlp)


@norm_mlp.backward
def backward(
    needs_grad, saved_tensors, dy, *,
    height, width, factor, norm, eps, norm_after, activation, saved,
):  # fmt: skip
    of_norm, of_mlp = _needs(needs_grad)
    saved_tensors = iter(saved_tensors)
    x, index, weight, mean, rstd = (next(saved_tensors) for _ in NOTHING)
    dy, *of_linears = _mlp.backward(of_mlp, saved_tensors, dy, activation=activation, saved=saved)
    if True not in of_norm:
        return None, None, None, *of_linears
    if _is_view(height, norm):
        given = _merged(x, factor) if norm_after else x
        dx, *found = _layer_norm_backward(
            dy.view(*given.shape), given, [given.shape[-1]], mean, rstd, weight, weight,
            [*of_norm[:3]],
        )  # fmt: skip
        found = dx if dx is None else dx.view(*x.shape), *found
    else:
        found = _norm.backward(
            of_norm, (x, index, weight, mean, rstd), dy, **_grid(x, height, width, factor),
            norm=norm, norm_after=norm_after, layout="patch", eps=eps,
        )  # fmt: skip
    return *found[:3], *of_linears


@norm_mlp.cost
def cost(x, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2, *, saved, **options):
    y = x.new_empty(x.numel() // weight_1.shape[1], weight_1.shape[1], device="meta")
    linears = mlp.cost_of(y, weight_1, bias_1, weight_2, bias_2, saved=saved)
    normed = pixel_shuffle_norm.cost_of(x, norm_weight, norm_bias, None, norm="layer")
    return Cost(*map(operator.add, astuple(linears), astuple(normed)))


@norm_mlp.inputs(
    smallest=dict(shape=(1, 1, 1), hidden=1, out=1, eps=0.01),
    usual=dict(shape=(3, 8, 7), hidden=9, out=5, factor=2, activation="silu"),
    others=[
        dict(shape=(2, 257, 24), drop_first=1, hidden=40, out=24, height=16, width=16, factor=2),
        dict(shape=(36, 40), hidden=33, out=17, factor=3, norm="rms", norm_after=False, eps=0.5),
        dict(shape=(2, 37, 24), drop_first=1, hidden=40, out=24, factor=3, norm_after=False),
        dict(
            shape=(2, 65, 72), hidden=80, out=33, norm="gemma", bias=False, activation="gelu_tanh",
            saved="input",
        ),
    ],
    large=dict(shape=(5, 107_000, 64), hidden=4096, out=64),
    bench={
        "InternVL, 13 tiles": dict(shape=(13, 256, 4096), hidden=3584, out=3584),
        "Qwen2.5-VL, 4096 patches": dict(
            shape=(4096, 1280), hidden=5120, out=3584, factor=2, norm="rms", norm_after=False,
            eps=1e-6,
        ),
    },
)  # fmt: skip
def inputs(
    shape: tuple[int, ...], hidden: int, out: int, *, factor: int = 1, norm: str = "layer",
    norm_after: bool = True, drop_first: int = 0, bias: bool = True,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    x = torch.randn(shape)[..., drop_first:, :] if drop_first else torch.randn(shape)
    merged = shape[-1] * factor**2
    normed = merged if norm_after else shape[-1]
    return (
        x,
        1 + torch.randn(normed) * 0.1,
        torch.randn(normed) * 0.1 if norm == "layer" else None,
        torch.randn(hidden, merged) * merged**-0.5,
        torch.randn(hidden) * 0.1 if bias else None,
        torch.randn(out, hidden) * hidden**-0.5,
        torch.randn(out) * 0.1 if bias else None,
    )
