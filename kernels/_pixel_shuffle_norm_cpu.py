"""`pixel_shuffle_norm` on a CPU: the compiled extension for fp32 and bf16, ATen otherwise."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._launcher import is_traced
from ._native import native
from ._patch_blocks import Blocks, Norm

KINDS = ("layer", "rms", "gemma")  # the order of NormKind in csrc
Normed = tuple[Tensor, Tensor | None, Tensor | None]  # y, means, 1 / standard deviations


def shuffled(x: Tensor, blocks: Blocks) -> Tensor:
    """Shuffle ``(batch, tokens, cols)`` into ``(merged, factor ** 2 * cols)``."""
    return _laid_out(_gathered(x, blocks), blocks)


def unshuffled(y: Tensor, blocks: Blocks, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `shuffled`, in rows of this shape; rows outside of all blocks are zero."""
    return _scattered(_patches(y, blocks), blocks, shape)


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Blocks, norm: Norm, want: bool
) -> Normed:
    """Return ``(merged, factor ** 2 * cols)`` and, if wanted, the statistics for backward."""
    if _compiled(x):
        return _native_forward(x, weight, bias, blocks, norm, want)
    y = _gathered(x, blocks)
    y = _laid_out(y, blocks) if norm.after else y
    y, mean, rstd = _normed(y, weight, bias, norm)
    y = y if norm.after else _laid_out(y, blocks)
    return (y, mean, rstd) if want else (y, None, None)


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor,
    blocks: Blocks, norm: Norm, wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x ``(batch, tokens, cols)``, weight and bias, or None if not wanted."""
    backward = _native_backward if _compiled(x) else _aten_backward
    dx, *others = backward(dy, x, weight, mean, rstd, blocks, norm, wants)
    return dx, *(g if g is None else g.to(weight.dtype) for g in others)


def _aten_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor,
    blocks: Blocks, norm: Norm, wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    patches = _gathered(x, blocks)
    if norm.after:
        merged = _laid_out(patches, blocks)
        dx, *others = _normed_backward(dy, merged, weight, mean, rstd, norm, wants)
        dx = dx if dx is None else _patches(dx, blocks)
    else:
        dy = _patches(dy, blocks)
        dx, *others = _normed_backward(dy, patches, weight, mean, rstd, norm, wants)
    return dx if dx is None else _scattered(dx, blocks, x.shape), *others


def _gathered(x: Tensor, blocks: Blocks) -> Tensor:
    """The patches ``(merged, factor ** 2, cols)``; a view if blocks are consecutive rows."""
    cols = x.shape[-1]
    if blocks.index is None:
        return _grid(x, blocks).reshape(-1, blocks.positions, cols)
    found = x.flatten(0, 1).index_select(0, blocks.index.flatten())
    return found.view(-1, blocks.positions, cols)


def _scattered(patches: Tensor, blocks: Blocks, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `_gathered`."""
    cols = shape[-1]
    if blocks.index is None:
        x = patches.new_empty(math.prod(shape[:-2]), shape[-2], cols)
        grid = _grid(x, blocks)
        grid.copy_(patches.reshape(grid.shape))
        return x.view(shape)
    x = patches.new_zeros(shape)
    x.view(-1, cols).index_copy_(0, blocks.index.flatten().long(), patches.reshape(-1, cols))
    return x


def _grid(x: Tensor, blocks: Blocks) -> Tensor:
    """A view ``(batch, block rows, block cols, factor, factor, cols)``."""
    s = blocks.factor
    return x.unflatten(1, (blocks.height // s, s, blocks.width // s, s)).transpose(2, 3)


def _laid_out(patches: Tensor, blocks: Blocks) -> Tensor:
    """Patches ``(merged, factor ** 2, cols)`` as merged tokens ``(merged, factor ** 2 * cols)``."""
    patches = patches.transpose(1, 2) if blocks.by_channel else patches
    return patches.reshape(patches.shape[0], -1)


def _patches(merged: Tensor, blocks: Blocks) -> Tensor:
    """The inverse of `_laid_out`."""
    if blocks.by_channel:
        return merged.unflatten(1, (-1, blocks.positions)).transpose(1, 2)
    return merged.unflatten(1, (blocks.positions, -1))


def _compiled(x: Tensor) -> bool:
    known = x.dtype in (torch.float32, torch.bfloat16)
    return native is not None and known and not x.is_cuda


def _native_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Blocks, norm: Norm, want: bool
) -> Normed:
    merged = blocks.count(x.shape[0])
    y = x.new_empty(merged, blocks.positions * x.shape[2])
    groups = merged if norm.after else merged * blocks.positions
    rstd = x.new_empty(groups, dtype=torch.float32) if want else None
    mean = torch.empty_like(rstd) if rstd is not None and norm.kind == "layer" else None
    if not is_traced(x):
        weight, bias = weight.float(), None if bias is None else bias.float()
        index = None if blocks.index is None else blocks.index.long()
        native.pixel_shuffle_norm(  # type: ignore[union-attr]
            x.data_ptr(), x.dtype is torch.bfloat16, _merge(x, blocks, index, norm),
            _norm(norm, weight, bias), y.data_ptr(), _address(mean), _address(rstd),
            torch.get_num_threads(),
        )  # fmt: skip
    return y, mean, rstd


def _native_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor,
    blocks: Blocks, norm: Norm, wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    dx = None
    if wants[0]:  # an index may omit rows, whose gradient is 0; a grid has every row
        dx = x.new_empty(*x.shape) if blocks.index is None else x.new_zeros(*x.shape)
    dweight, dbias = (
        weight.new_zeros(*weight.shape, dtype=torch.float32) if want else None for want in wants[1:]
    )
    if not is_traced(x):
        weight = weight.float()
        index = None if blocks.index is None else blocks.index.long()
        native.pixel_shuffle_norm_backward(  # type: ignore[union-attr]
            dy.data_ptr(), x.data_ptr(), x.dtype is torch.bfloat16,
            _merge(x, blocks, index, norm), _norm(norm, weight, None), _address(mean),
            rstd.data_ptr(), _address(dx), _address(dweight), _address(dbias),
            torch.get_num_threads(),
        )  # fmt: skip
    return dx, dweight, dbias


def _merge(x: Tensor, blocks: Blocks, index: Tensor | None, norm: Norm) -> Any:
    s = blocks.factor
    batch, tokens, cols = x.shape
    sizes = [blocks.count(batch), s, cols, blocks.per_image, blocks.across, blocks.width, tokens]
    sizes += x.stride()[:2]
    return native.Merge(  # type: ignore[union-attr]
        sizes, _address(index), blocks.by_channel, norm.after
    )


def _norm(norm: Norm, weight: Tensor, bias: Tensor | None) -> Any:
    return native.Norm(  # type: ignore[union-attr]
        KINDS.index(norm.kind), _address(weight), _address(bias), norm.eps
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _normed(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm) -> Normed:
    if norm.kind == "layer":
        return torch.native_layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
    wide = x.float()
    rstd = wide.square().mean(-1, keepdim=True).add_(norm.eps).rsqrt_()
    if norm.kind == "gemma":
        return (wide * rstd).mul_(weight.float() + 1).to(x.dtype), None, rstd
    return ((wide * rstd).to(x.dtype) * weight).to(x.dtype), None, rstd


def _normed_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor, norm: Norm,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    if mean is not None:
        return torch.ops.aten.native_layer_norm_backward(
            dy, x, x.shape[-1:], mean, rstd, weight, weight, wants
        )
    unit = x.float() * rstd
    dweight = (dy * unit).flatten(0, -2).sum(0) if wants[1] else None
    if not wants[0]:
        return None, dweight, None
    dunit = dy.float() * (weight.float() + 1 if norm.kind == "gemma" else weight)
    dx = dunit.sub_(unit * (dunit * unit).mean(-1, keepdim=True)).mul_(rstd)
    return dx.to(x.dtype), dweight, None
