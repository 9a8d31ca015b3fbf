"""Blocks of patches merged into one token each, with the norm that stands before or after."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_fast.fallback import switches
from vlm_fast.kernels import pixel_shuffle_norm as kernels
from vlm_fast.kernels._launcher import is_traced
from vlm_fast.kernels._patch_blocks import Blocks, Norm
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_type, wrong_value
from vlm_fast.ops.declaration import FLOATS, Cost, nbytes, op

NAME = "pixel_shuffle_norm"
NORMS = ("none", "layer", "rms", "gemma")
LAYOUTS = ("patch", "channel")
MAX_FEATURES = 8192
MAX_FACTOR = 8


@op
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
    """``factor x factor`` patches side by side in one token (space-to-depth), normed.

    Mirrors ``pixel_shuffle`` of transformers' InternVL, Idefics3 and Llama 4 with the norm of the
    projector behind it, and the patch mergers of Qwen-VL and Mistral 3. The shuffle is where the
    norm reads from: nothing is copied. Gradients to x, weight and bias.

    Args:
        x: ``(..., height * width, features)``, a grid in row-major order; rows at any pitch, as in
            ``hidden[:, 1:]``, are not copied.
        weight, bias: ``(features,)``, or ``(factor ** 2 * features,)`` with ``norm_after``; of x's
            dtype or fp32. Without a norm None; a bias is LayerNorm's only.
        index: int32 or int64 ``(blocks, factor ** 2)``, for what is no grid (images of several
            sizes, windows): the rows of x, of all images together, that make a block. A row may be
            left out (its gradient is 0), and is in one block at most: that is not looked for.
        height, width: the grid, multiples of ``factor``; with an index unread. Blocks of
            consecutive tokens are a grid of width ``factor``.
        factor: patches along a side of a block, at most 8.
        norm: "none"; "layer" (arXiv 1607.06450); "rms" (arXiv 1910.07467), in Llama's form, rounded
            to x's dtype before the weight; "gemma", with weight + 1 and one rounding at the end.
        norm_after: whether a merged token is normed as a whole, or each of its patches.
        layout: of a merged token. "patch": channel ``(dy * factor + dx) * features + c``, of
            nearly all models; "channel": ``c * factor ** 2 + dy * factor + dx``, of ``F.unfold``.
        eps: added to the variance, or to the mean square.

    More than 8192 features in a block of a norm (each side rounded up to a power of two), and
    dtypes other than fp32, fp16 and bf16, fall back. Statistics are fp32. Returns ``(..., height *
    width / factor ** 2, factor ** 2 * features)``, or ``(blocks, factor ** 2 * features)``, of x's
    dtype: blocks in row-major order, or in that of the index.

    Raises:
        TypeError: an argument is no tensor, or of a dtype not named here.
        ValueError: shapes do not fit, the grid is empty or does not divide, devices differ, an
            option is unknown, or an index names a row that is not there (on CUDA a device-side
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


def _normed(x, weight, bias, norm, eps):
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


@pixel_shuffle_norm.accepts
def accepts(x, weight, bias, index, **options):
    mistake = _mistake(x, weight, bias, index, **options)
    if mistake is not None:
        raise mistake
    return x, weight, bias, index


def _mistake(x, weight, bias, index, *, height, width, factor, norm, norm_after, layout, eps):
    named = dict(x=x, weight=weight, bias=bias, index=index)
    for argument, value in named.items():
        if not isinstance(value, Tensor) and not (value is None and argument != "x"):
            return not_a_tensor(NAME, argument, value)
    if norm not in NORMS:
        return wrong_value(NAME, "norm", norm, f"one of {NORMS}")
    if layout not in LAYOUTS:
        return wrong_value(NAME, "layout", layout, f"one of {LAYOUTS}")
    if factor < 1 or factor > MAX_FACTOR:
        return wrong_value(NAME, "factor", factor, f"1 to {MAX_FACTOR}")
    if x.ndim < 2:
        return wrong_value(NAME, "x", x, "(..., tokens, features)")
    if index is not None:
        if index.ndim != 2 or index.shape[1] != factor**2:
            wanted = f"(blocks, {factor**2}), the rows of x in a block"
            return wrong_value(NAME, "index", index, wanted)
        if index.dtype not in (torch.int32, torch.int64):
            return wrong_type(NAME, "index", index, "torch.int32 or torch.int64")
    else:
        for argument, value in (("height", height), ("width", width)):
            if value < 1 or value % factor:
                wanted = f"a multiple of the factor {factor}, above 0"
                return wrong_value(NAME, argument, value, wanted)
        if x.shape[-2] != height * width:
            wanted = f"(..., {height * width}, features), a grid of {height} x {width} tokens"
            return wrong_value(NAME, "x", x, wanted)
    return _mistake_of_dtypes(x, weight, bias, norm) or _mistake_of_norm(
        x, weight, bias, norm, x.shape[-1] * (factor**2 if norm_after else 1)
    ) or _elsewhere(x, named)  # fmt: skip


def _mistake_of_dtypes(x, weight, bias, norm):
    if not x.is_floating_point():
        return wrong_type(NAME, "x", x, "a floating dtype (float32, bfloat16 or float16)")
    if weight is not None and weight.dtype not in (x.dtype, torch.float32):
        return wrong_type(NAME, "weight", weight, f"{x.dtype} as x has, or torch.float32")
    if weight is not None and bias is not None and bias.dtype != weight.dtype:
        return wrong_type(NAME, "bias", bias, f"{weight.dtype} as weight has")
    return None


def _mistake_of_norm(x, weight, bias, norm, features):
    if norm == "none" and weight is not None:
        return wrong_value(NAME, "weight", weight, "None without a norm")
    if norm != "layer" and bias is not None:
        return wrong_value(NAME, "bias", bias, "None, of all but a LayerNorm")
    if norm != "none" and weight is None:
        return wrong_value(NAME, "weight", weight, f"({features},) for the norm {norm!r}")
    for argument, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != (features,):
            return wrong_value(NAME, argument, value, f"({features},), what is normed together")
    return None


def _elsewhere(x, named):
    for argument, value in named.items():
        if value is not None and value.device != x.device:
            return wrong_value(NAME, argument, value, f"{x.device}, where x is")
    return None


@pixel_shuffle_norm.requires
def requires(x, weight, bias, index, *, factor, norm, **options):
    if x.dtype not in FLOATS:
        return f"{x.dtype} has no kernels here (float32, bfloat16 and float16 have)"
    if norm != "none":
        held = _power_of_two(factor**2) * _power_of_two(x.shape[-1])
        if held > MAX_FEATURES:
            return f"{held} features of a block are more than {MAX_FEATURES}, what a program holds"
    return None


def rows_of_blocks(
    grids: Sequence[tuple[int, int]], factor: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The index of images of several sizes whose tokens follow each other.

    ``grids`` are height and width of each, in tokens; rows and columns that fill no block are left
    out. Made on the device, which nothing waits for.
    """
    index, first = [torch.empty(0, factor**2, dtype=torch.int64, device=device)], 0
    for height, width in grids:
        rows = torch.arange(first, first + height * width, device=device).view(height, width)
        rows = rows[: height // factor * factor, : width // factor * factor]
        blocks = rows.unflatten(0, (-1, factor)).unflatten(2, (-1, factor)).transpose(1, 2)
        index.append(blocks.reshape(-1, factor**2))
        first += height * width
    return torch.cat(index)


def _power_of_two(n):
    return 1 << max(n - 1, 0).bit_length()


@pixel_shuffle_norm.forward
def forward(needs, x, weight, bias, index, *, height, width, factor, norm, norm_after, layout, eps):
    if index is not None:
        index = index.contiguous()
        _check_rows(index, math.prod(x.shape[:-1]))
    blocks = Blocks(factor, height, width, index, layout == "channel")
    shape = _merged_shape(x, index, factor)
    wanted = any(needs)
    if x.numel() == 0 or math.prod(shape) == 0:
        return x.new_zeros(shape), (_likeness(x), index, weight, None, None) if wanted else ()
    if norm == "none":
        y = kernels.pixel_shuffle(x, blocks).view(shape)
        return y, (_likeness(x), index, None, None, None) if wanted else ()
    y, mean, rstd = kernels.pixel_shuffle_norm(
        x, weight.contiguous(), None if bias is None else bias.contiguous(),
        blocks, Norm(norm, norm_after, eps), wanted,
    )  # fmt: skip
    return y.view(shape), (x, index, weight, mean, rstd) if wanted else ()


@pixel_shuffle_norm.backward
def backward(needs, kept, dy, *, height, width, factor, norm, norm_after, layout, eps):
    x, index, weight, mean, rstd = kept
    blocks = Blocks(factor, height, width, index, layout == "channel")
    shape = (*x.shape[:-1], dy.shape[-1] // factor**2)
    if dy.numel() == 0 or math.prod(shape) == 0:
        parameters = [torch.zeros_like(weight) if need else None for need in needs[1:3]]
        return dy.new_zeros(shape) if needs.x else None, *parameters, None
    dy = dy.contiguous().view(-1, dy.shape[-1])
    if norm == "none":
        return kernels.pixel_unshuffle(dy, blocks, shape), None, None, None
    dx, dweight, dbias = kernels.pixel_shuffle_norm_backward(
        dy, x, weight.contiguous(), mean, rstd, blocks, Norm(norm, norm_after, eps),
        want_x=needs.x, want_weight=needs.weight, want_bias=needs.bias,
    )  # fmt: skip
    return (
        dx,
        dweight.to(weight.dtype) if needs.weight else None,
        dbias.to(weight.dtype) if needs.bias else None,
        None,
    )


def _merged_shape(x, index, factor):
    features = factor**2 * x.shape[-1]
    if index is not None:
        return index.shape[0], features
    return *x.shape[:-2], x.shape[-2] // factor**2, features


def _likeness(x: Tensor) -> Tensor:
    """The rows and dtype of a tensor without its elements, for its gradient."""
    return x.new_empty(*x.shape[:-1], 0)


def _check_rows(index: Tensor, rows: int) -> None:
    """At once where it costs nothing or strictness asks for it; else an assertion on the device."""
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
def cost(x, weight, bias, index, *, norm, **options):
    features, parameters = nbytes(x), nbytes(weight, bias)
    return Cost(
        forward_flops=0 if norm == "none" else 8 * x.numel(),
        forward_bytes=2 * features + parameters + nbytes(index),
        backward_flops=0 if norm == "none" else 14 * x.numel(),
        backward_bytes=(2 if norm == "none" else 3) * features + 2 * parameters + nbytes(index),
    )


@pixel_shuffle_norm.inputs(
    test=[
        dict(batch=1, height=1, width=1, features=1, factor=1, norm="gemma", eps=0.01),
        dict(batch=3, height=4, width=6, features=17, norm="layer"),
        dict(batch=2, height=6, width=6, features=24, factor=3, drop_first=1),
        dict(
            batch=2, height=1, width=11, features=40, indexed=True, norm="rms", norm_after=False,
            layout="channel", eps=1e-6,
        ),
        dict(batch=1, height=6, width=2, features=72, norm="layer", norm_after=False),
    ],
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
