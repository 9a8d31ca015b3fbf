"""Run ops on fake CUDA tensors, forward and backward, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from vlm_fast.ops.declaration import Op


def fake_arguments(
    op: Op[..., Any], shape: Mapping[str, Any], dtype: torch.dtype
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments and options of an op at a shape, with tensors on a fake GPU.

    Call this inside a `FakeTensorMode`.
    """
    values, settings = op.sample(shape, dtype)
    return op._bind(tree_map_only(Tensor, _on_cuda, values), settings)


def run_with_gradients(
    op: Op[..., Any],
    values: tuple[Any, ...],
    settings: dict[str, Any],
    between: Callable[[], None] = lambda: None,
) -> None:
    """Run the op's forward, ``between()``, and its backward for the gradients of all arguments.

    This bypasses autograd: the autograd engine of a CPU build of torch has no CUDA device, not even
    for fake tensors.
    """
    path, values = op._path, op.accepted(values, settings)
    count = path.count(values)
    needs = tuple(isinstance(v, Tensor) and v.is_floating_point() for v in path.flatten(values))
    result, kept = path.forward(path.needs_of(needs, count), *values, **settings)
    between()
    dy = [torch.empty_like(r) for r in ((result,) if path.single else result)]
    path.gradients(needs, count, kept, dy, settings)


def _on_cuda(tensor: Tensor) -> Tensor:
    """A CUDA tensor with the same strides and offset; they decide how wide a load can be."""
    size = tensor.untyped_storage().nbytes() // tensor.itemsize
    storage = torch.empty(size, dtype=tensor.dtype, device="cuda")
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
