"""What an op moves through memory, piece by piece, counted from its launches on stand-ins.

An upper count: every tensor that a kernel or an ATen op is given counts whole, once, as read or as
written, although a gather reads some of its rows; what a kernel reads twice counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vlm_fast.devtools import ahead_of_time
from vlm_fast.kernels._launcher import Launch, recording
from vlm_fast.ops.declaration import Op

FREE = {"_unsafe_view", "detach", "lift_fresh"}
OVERWRITES = {"copy_", "fill_", "zero_"}  # they do not read what they write
SHAPED = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}  # nor this


@dataclass(frozen=True)
class Piece:
    """One kernel of a pass: of this package, with its launch, or ATen's, with its FLOPs.

    ``indexed``: it is given numbers of rows, and may move less than these bytes.
    """

    name: str
    backward: bool
    bytes: int
    flops: int = 0
    launch: Launch | None = None
    indexed: bool = False


def pieces(
    op: Op[..., Any], shape: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16
) -> list[Piece]:
    """Forward without gradients, and backward for all of them, in the order of execution."""
    with FakeTensorMode(), torch.no_grad(), recording() as launches:
        values, settings = ahead_of_time.stand_ins(op, shape, dtype)
        with _Work(launches) as work:
            values = op.accepted(values, settings)
            op._path.forward(op._path.none_needed, *values, **settings)
        forward = work.pieces(backward=False)
        if op.returns_indices:
            return forward
        with _Work(launches) as work:
            ahead_of_time.with_gradients(op, values, settings, between=work.restart)
        return forward + work.pieces(backward=True)


def launches_something(func: Any) -> bool:
    """Whether an ATen op does work on the GPU: it neither makes a view nor merely allocates."""
    returns, name = func._schema.returns, func._opname
    if func.namespace != "aten":  # a question, of a device or a stride
        return False
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return not (is_view or name.startswith(("empty", "new_empty")) or name in FREE)


def moved(read: Iterable[Any], written: Iterable[Any] = ()) -> int:
    """Bytes of the different tensors in each; parts of one storage are at most the storage."""
    return sum(_distinct(tree_leaves(list(group))) for group in (read, written))


def _distinct(leaves: Iterable[Any]) -> int:
    regions: dict[tuple[Any, ...], Tensor] = {}
    for tensor in leaves:
        if isinstance(tensor, Tensor):
            # An expanded dimension is one element of memory.
            sizes = tuple(
                1 if stride == 0 else n
                for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
            storage = tensor.untyped_storage()._cdata
            regions[storage, tensor.storage_offset(), sizes] = tensor
    of_storage: dict[int, int] = {}
    whole: dict[int, int] = {}
    for (storage, _, sizes), tensor in regions.items():
        size = torch.Size(sizes).numel() * tensor.itemsize
        of_storage[storage] = of_storage.get(storage, 0) + size
        whole[storage] = tensor.untyped_storage().nbytes()
    return sum(min(size, whole[storage]) for storage, size in of_storage.items())


def _holds_indices(value: Any) -> bool:
    whole = isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)
    return whole and value.numel() > 1  # one is a seed


class _Work(TorchDispatchMode):
    """Notes ATen's work, and where the launches of kernels lie between."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches
        self.restart()

    def restart(self) -> None:
        self.first = len(self.launches)
        self.noted: list[tuple[int, str, int, int]] = []

    def pieces(self, *, backward: bool) -> list[Piece]:
        found, at = [], self.first
        for until, name, size, flops in [*self.noted, (len(self.launches), "", 0, 0)]:
            for launch in self.launches[at:until]:
                given = list(launch.arguments.values())
                indexed = any(_holds_indices(value) for value in given)
                name_of = launch.kernel.name
                found.append(Piece(name_of, backward, moved(given), 0, launch, indexed))
            at = until
            if name:
                found.append(Piece(f"aten.{name}", backward, size, flops))
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not launches_something(func):
            return result
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        changed = {a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write}
        only_written = changed if func._opname in OVERWRITES else changed & {"out"}
        unread = only_written | ({"self"} if func._opname in SHAPED else set())
        read = [value for name, value in named.items() if name not in unread]
        counted = flop_registry.get(func._overloadpacket)
        factors = [value for value in args if isinstance(value, Tensor)]  # not bmm's dtype
        flops = counted(*factors, out_val=result) if counted else 0
        self.noted.append((len(self.launches), func._opname, moved(read, [result]), flops))
        return result
