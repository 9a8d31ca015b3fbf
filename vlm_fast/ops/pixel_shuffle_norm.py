"""Pixel shuffle: blocks of patches merged into one token each, with a norm before or after."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.fallback import switches
from vlm_fast.kernels import pixel_shuffle_norm as kernels
from vlm_fast.kernels._launcher import is_traced
from vlm_fast.kernels._patch_blocks import Blocks, Norm
from vlm_fast.ops.declaration import Cost, nbytes, no_kernel_for, op
from vlm_fast.ops.rows import empty_like_rows

NAME = "pixel_shuffle_norm"
NORMS = ("none", "layer", "rms", "gemma")
LAYOUTS = ("patch", "channel")
MAX_FEATURES = 8192
MAX_FACTOR = 8


@op(
    x="floating (..., tokens, features)",
    weight="like x or float32 (features * factor ** (2 * norm_after)) or None",
    bias="like weight (features * factor ** (2 * norm_after)) or None",
    index="int32 or int64 (blocks, factor ** 2) or None",
    factor=f"int from 1 to {MAX_FACTOR}",
    norm=NORMS,
    layout=LAYOUTS,
    where={
        "index is not None or (height > 0 and height % factor == 0)": (
            "height: a multiple of the factor {factor}, above 0"
        ),
        "index is not None or (width > 0 and width % factor == 0)": (
            "width: a multiple of the factor {factor}, above 0"
        ),
        "index is not None or tokens == height * width": (
            "x: (..., {height * width}, features), a grid of {height} x {width} tokens"
        ),
        "norm != 'none' or weight is None": "weight: None without a norm",
        "norm == 'layer' or bias is None": "bias: None, except for a LayerNorm",
        "norm == 'none' or weight is not None": "weight: a tensor for the norm {norm}",
    },
)
def pixel_shuffle_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    *,
    height: int = 0,
    width: int = 0,
    factor: int = 2,
    norm: str = "none",
    norm_after: bool = True,
    layout: str = "patch",
    eps: float = 1e-5,
) -> Tensor:
    """Merge ``factor x factor`` patches into one token (space-to-depth), and norm them.

    Mirrors ``pixel_shuffle`` of transformers' InternVL, Idefics3 and Llama 4 with the norm of the
    projector behind it, and the patch mergers of Qwen-VL and Mistral 3. The norm reads the patches
    in place, so nothing is copied. Statistics are fp32. Gradients go to x, weight and bias.
    Dtypes other than fp32, fp16 and bf16, and more than 8192 normed features in a block (factor and
    features rounded up to powers of two), fall back.

    Args:
        x: A grid in row-major order. Rows at any pitch, as in ``hidden[:, 1:]``, are not copied.
        weight: The weight of the norm, for a token, or for a merged token with ``norm_after``.
        bias: The bias of a LayerNorm; other norms have none.
        index: For tokens that form no grid (images of several sizes, windows): the rows of x, of
            all images together, that make each block, as `rows_of_blocks` returns them. A row may
            be left out (its gradient is 0) and must be in one block at most, which is not checked.
        height: Rows of the grid, a multiple of ``factor``. Ignored with an index. For blocks of
            consecutive tokens, the width is ``factor``.
        width: Columns of the grid, a multiple of ``factor``. Ignored with an index.
        factor: Patches along a side of a block.
        norm: "none"; "layer" (arXiv 1607.06450); "rms" (arXiv 1910.07467) in Llama's form, which
            rounds to x's dtype before it multiplies by the weight; "gemma", which multiplies by
            weight + 1 and rounds once.
        norm_after: True to norm a merged token as a whole, False to norm each patch.
        layout: Order of a merged token's channels. "patch": ``(dy * factor + dx) * features + c``,
            as in nearly all models. "channel": ``c * factor ** 2 + dy * factor + dx``, as in
            ``F.unfold``.
        eps: Added to the variance, or to the mean square.

    Returns:
        ``(..., height * width / factor ** 2, factor ** 2 * features)``, blocks in row-major order;
        or ``(blocks, factor ** 2 * features)`` in the order of the index. Of x's dtype.

    Raises:
        ValueError: Also if an index names a row that x does not have (on CUDA a device-side
            assertion, and an error on the host only under `vlm_fast.strict`).
    """
    if index is None:
        across = (height // factor, factor, width // factor, factor)
        blocks = x.unflatten(-2, across).transpose(-4, -3).flatten(-3, -2).flatten(-4, -3)
    else:
        blocks = x.flatten(0, -2)[index]
    if not norm_after:
        blocks = _normed(blocks, weight, bias, norm, eps)
    if layout == "channel":
        blocks = blocks.transpose(-1, -2)
    merged = blocks.flatten(-2)
    return _normed(merged, weight, bias, norm, eps) if norm_after else merged


def _normed(x: Tensor, weight: Any, bias: Tensor | None, norm: str, eps: float) -> Tensor:
    """``x`` normed over its last size in plain PyTorch."""
    if norm == "none":
        return x
    if norm == "layer":
        bias = None if bias is None else bias.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if norm == "gemma":
        return (unit * (1 + weight.to(unit.dtype))).to(x.dtype)
    return (weight * unit.to(x.dtype)).to(x.dtype)


@pixel_shuffle_norm.fallback_reason
def fallback_reason(
    x: Tensor, *tensors: Tensor | None, factor: int, norm: str, **options: Any
) -> str | None:
    reason = None if norm == "none" else why_block_too_wide(x, factor)
    return reason or no_kernel_for(x)


def why_block_too_wide(x: Tensor, factor: int) -> str | None:
    """Why no program can hold a block of patches of ``x (..., tokens, features)``, or None."""
    padded = _power_of_two(factor**2) * _power_of_two(x.shape[-1])
    many = f"{padded} features of a block are more than {MAX_FEATURES}, the most per program"
    return many if padded > MAX_FEATURES else None


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


@pixel_shuffle_norm.forward
def forward(
    needs_grad, x, weight, bias, index, *, height, width, factor, norm, norm_after, layout, eps
):
    if index is not None:
        index = index.contiguous()
        _check_rows(index, math.prod(x.shape[:-1]))
    blocks = Blocks(factor, height, width, index, layout == "channel")
    shape = _merged_shape(x, index, factor)
    any_needed = True in needs_grad
    if x.numel() == 0 or math.prod(shape) == 0:
        saved = empty_like_rows(x), index, weight, None, None
        return x.new_zeros(shape), saved if any_needed else ()
    if norm == "none":
        y = kernels.pixel_shuffle(x, blocks, shape)
        return y, (empty_like_rows(x), index, None, None, None) if any_needed else ()
    y, mean, rstd = kernels.pixel_shuffle_norm(
        x, weight.contiguous(), None if bias is None else bias.contiguous(),
        blocks, Norm(norm, norm_after, eps), any_needed, shape,
    )  # fmt: skip
    return y, (x, index, weight, mean, rstd) if any_needed else ()


@pixel_shuffle_norm.backward
def backward(
    needs_grad, saved_tensors, dy, *, height, width, factor, norm, norm_after, layout, eps
):
    x, index, weight, mean, rstd = saved_tensors
    blocks = Blocks(factor, height, width, index, layout == "channel")
    shape = (*x.shape[:-1], dy.shape[-1] // factor**2)
    if dy.numel() == 0 or math.prod(shape) == 0:
        parameters = [torch.zeros_like(weight) if need else None for need in needs_grad[1:3]]
        return dy.new_zeros(shape) if needs_grad.x else None, *parameters, None
    dy = dy.contiguous().view(-1, dy.shape[-1])
    if norm == "none":
        return kernels.pixel_unshuffle(dy, blocks, shape), None, None, None
    dx, dweight, dbias = kernels.pixel_shuffle_norm_backward(
        dy, x, weight.contiguous(), mean, rstd, blocks, Norm(norm, norm_after, eps),
        want_x=needs_grad.x, want_weight=needs_grad.weight, want_bias=needs_grad.bias,
    )  # fmt: skip
    return dx, dweight, dbias, None


def _merged_shape(x: Tensor, index: Tensor | None, factor: int) -> tuple[int, ...]:
    features = factor**2 * x.shape[-1]
    if index is not None:
        return index.shape[0], features
    return *x.shape[:-2], x.shape[-2] // factor**2, features


def _check_rows(index: Tensor, rows: int) -> None:
    """Check that an index names rows of x.

    On the host if that costs no synchronisation or under `vlm_fast.strict`; otherwise with an
    assertion on the device.
    """
    if is_traced(index) or index.numel() == 0:
        return
    low, high = index.aminmax()
    if index.is_cuda and not switches.strict:
        message = f"vlm_fast.{NAME}: index names rows that x does not have"
        torch._assert_async((low >= 0) & (high < rows), message)
    elif int(low) < 0 or int(high) >= rows:
        raise ValueError(
            f"vlm_fast.{NAME}: index names rows {int(low)} to {int(high)}, expected 0 to {rows - 1}"
        )


@pixel_shuffle_norm.cost
def cost(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, index: Tensor | None,
    *, norm: str, **options: Any,
) -> Cost:  # fmt: skip
    features, parameters = nbytes(x), nbytes(weight, bias)
    return Cost(
        forward_flops=0 if norm == "none" else 8 * x.numel(),
        forward_bytes=2 * features + parameters + nbytes(index),
        backward_flops=0 if norm == "none" else 14 * x.numel(),
        backward_bytes=(2 if norm == "none" else 3) * features + 2 * parameters + nbytes(index),
    )


@pixel_shuffle_norm.inputs(
    smallest=dict(batch=1, height=1, width=1, features=1, factor=1, norm="gemma", eps=0.01),
    usual=dict(batch=3, height=4, width=6, features=17, norm="layer"),
    others=[
        dict(batch=2, height=6, width=6, features=24, factor=3, drop_first=1),
        dict(
            batch=2, height=1, width=11, features=40, indexed=True, norm="rms", norm_after=False,
            layout="channel", eps=0.5,
        ),
        dict(batch=1, height=6, width=2, features=72, norm="layer", norm_after=False, eps=0.5),
    ],
    large=dict(batch=5, height=460, width=460, features=2048, norm='layer'),
    bitwise=True,
    bench={
        "InternVL, 64 tiles": dict(
            batch=64, height=32, width=32, features=1024, drop_first=1, norm="layer"
        ),
        "InternVL, 13 tiles": dict(
            batch=13, height=32, width=32, features=1024, drop_first=1, norm="layer"
        ),
        "Qwen2.5-VL, 16384 patches": dict(
            batch=1, height=8192, width=2, features=1280, norm="rms", norm_after=False, eps=1e-6
        ),
        "Qwen2-VL, 16384 patches": dict(
            batch=1, height=8192, width=2, features=1280, norm="layer", norm_after=False, eps=1e-6
        ),
        "Mistral-3, 4 images of 1540 x 1540": dict(
            batch=4, height=110, width=110, features=1024, indexed=True, norm="rms",
            norm_after=False, layout="channel",
        ),
        "SmolVLM-2.2B, 17 tiles": dict(batch=17, height=27, width=27, features=1152, factor=3),
        "Gemma-3, 8 images": dict(
            batch=8, height=16, width=16, features=1152, factor=1, norm="gemma"
        ),
    },
)  # fmt: skip
def inputs(
    batch, height, width, features, *,
    factor=2, norm="none", norm_after=True, indexed=False, drop_first=0,
):  # fmt: skip
    x = torch.randn(batch, height * width + drop_first, features)[:, drop_first:]
    rows, positions = batch * height * width, factor**2
    index = torch.randperm(rows)[: rows // positions * positions] if indexed else None
    normed = features * positions if norm_after else features
    return (
        x,
        None if norm == "none" else 1 + torch.randn(normed) * 0.1,
        torch.randn(normed) * 0.1 if norm == "layer" else None,
        None if index is None else index.view(-1, positions),
    )
