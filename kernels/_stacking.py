"""Several tensors as one, without a copy where they already lie one behind the other in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._launcher import is_traced


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.cat(tensors)``; a view, and no launch, after `lay_side_by_side`."""
    first = tensors[0]
    if not is_traced(first) and _adjacent(tensors):
        rows = sum(t.shape[0] for t in tensors)
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
    return torch.cat(list(tensors))


def _adjacent(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    storage, inner = first.untyped_storage().data_ptr(), first.shape[1:]
    expected = first.data_ptr()
    for t in tensors:
        if (
            t.data_ptr() != expected
            or t.dtype is not first.dtype
            or t.shape[1:] != inner
            or not t.is_contiguous()
            or t.untyped_storage().data_ptr() != storage
        ):
            return False
        expected += t.numel() * t.element_size()
    return True


def lay_side_by_side(parameters: Sequence[nn.Parameter]) -> None:
    """Move the data of these parameters into one buffer; they stay the objects they are.

    Leaves them alone unless all are plain parameters of one dtype and device, with data.
    """
    first = parameters[0]
    for p in parameters:
        if type(p) is not nn.Parameter or type(p.data) is not Tensor or is_traced(p.data):
            return
        if p.dtype != first.dtype or p.device != first.device or p.shape[1:] != first.shape[1:]:
            return
    if _adjacent(parameters):
        return
    buffer = torch.cat([p.data for p in parameters])
    for p, part in zip(parameters, buffer.split([p.shape[0] for p in parameters]), strict=True):
        p.data = part
