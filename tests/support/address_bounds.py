"""Checks that interpreted kernels read and write only inside the tensors of their arguments.

Guard bands detect writes outside and reads that change a result. This check also detects reads
outside that no result depends on, which may fault on a GPU.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, TensorHandle
from triton.runtime.interpreter import InterpreterBuilder as Builder

allowed: list[tuple[int, int]] = []  # first byte and the one after the last, for each tensor


class OutOfBounds(AssertionError):
    pass


def extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def tensors_among(arguments) -> list[Tensor]:
    found = [getattr(a, "base", a) for a in arguments]  # a descriptor has its tensor as base
    return [t for t in found if isinstance(t, Tensor) and t.numel()]


def check(kind: str, pointers: TensorHandle, mask) -> None:
    active = np.broadcast_to(np.asarray(mask.data, dtype=bool), pointers.data.shape)
    addresses = pointers.data[active].astype(np.int64)
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    inside = np.zeros(addresses.shape, dtype=bool)
    for start, end in allowed:
        inside |= (addresses >= start) & (addresses + size <= end)
    if not inside.all():
        outside = (~inside).sum()
        raise OutOfBounds(f"{kind} of {outside} elements outside every tensor of the launch")


def enforce() -> None:
    """Check every launch of this process from now on."""
    prepare, load, store = (
        GridExecutor._init_args_hst,
        Builder.create_masked_load,
        Builder.create_masked_store,
    )
    rmw, cas = Builder.create_atomic_rmw, Builder.create_atomic_cas

    def prepare_and_note(self, arguments, keywords):
        on_host = prepare(self, arguments, keywords)
        allowed[:] = [extent(t) for t in tensors_among([*on_host[0], *on_host[1].values()])]
        return on_host

    def create_masked_load(self, pointers, mask, *rest):
        check("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def create_masked_store(self, pointers, value, mask, *rest):
        check("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def create_atomic_rmw(self, operation, pointers, value, mask, *rest):
        check("atomic", pointers, mask)
        return rmw(self, operation, pointers, value, mask, *rest)

    def create_atomic_cas(self, pointers, *rest):
        check("atomic", pointers, np.ones_like(pointers.data, dtype=bool))
        return cas(self, pointers, *rest)

    GridExecutor._init_args_hst = prepare_and_note
    Builder.create_masked_load = create_masked_load
    Builder.create_masked_store = create_masked_store
    Builder.create_atomic_rmw = create_atomic_rmw
    Builder.create_atomic_cas = create_atomic_cas
