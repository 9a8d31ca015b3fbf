"""The kernels that one pass of an op runs, in order, recorded on tensors without data."""

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

from vlm_fast.devtools import fake_runs
from vlm_fast.kernels._launcher import Launch, recording
from vlm_fast.ops.declaration import Op
from vlm_fast.verification.tolerance import convert, differentiable

NO_KERNEL = {"_unsafe_view", "alias", "detach", "lift_fresh", "scalar_tensor"}
OVERWRITES = {"copy_", "fill_", "zero_"}  # they do not read what they write
SHAPE_ONLY = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}


@dataclass(frozen=True)
class AtenKernel:
    """One ATen operation: its name, the bytes it reads and writes, and of a product its sizes.

    Attributes:
        sizes: batch, rows, columns and inner size of a product; empty otherwise.
    """

    name: str
    bytes: int
    sizes: tuple[int, ...] = ()


Passes = dict[str, list[Launch | AtenKernel]]


def of_op(
    op: Op[..., Any], shape: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16
) -> Passes:
    """The forward without gradients and the backward for all of them, of an op's kernels."""
    with FakeTensorMode(), torch.no_grad(), recording() as launches:
        values, settings = fake_runs.fake_arguments(op, shape, dtype)
        path = op._path
        with _Recorder(launches) as recorder:
            path.forward(path.none_needed, *op.accepted(values, settings), **settings)
            found = {"forward": recorder.kernels()}
            if not op.returns_indices:
                fake_runs.run_with_gradients(op, values, settings, recorder.restart)
                found["backward"] = recorder.kernels()
    return found


def of_reference(
    op: Op[..., Any], shape: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16
) -> Passes:
    """The passes of an op's reference in plain PyTorch, recorded on fake CPU tensors."""
    with FakeTensorMode():
        values, settings = op.sample(shape, dtype)
        with _Recorder([]) as recorder, torch.no_grad():
            op.reference(*values, **settings)
        found = {"forward": recorder.kernels()}
        if not op.returns_indices:
            leaves = convert(values, lambda t: t.detach().requires_grad_())
            results = op.reference(*leaves, **settings)
            results = results if isinstance(results, tuple) else (results,)
            results = [result for result in results if result.requires_grad]
            upstream = [torch.empty_like(result) for result in results]
            with _Recorder([]) as recorder:
                torch.autograd.grad(results, differentiable(leaves), upstream, allow_unused=True)
            found["backward"] = recorder.kernels()
    return found


def bytes_of(values: Iterable[Any]) -> int:
    """Bytes of the tensors in ``values``; a storage counts once, an expanded dimension as 1."""
    views: dict[tuple[Any, ...], Tensor] = {}
    for tensor in tree_leaves(list(values)):
        if isinstance(tensor, Tensor):
            sizes = tuple(
                1 if stride == 0 else n
                for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
            views[tensor.untyped_storage()._cdata, tensor.storage_offset(), sizes] = tensor
    by_storage: dict[int, int] = {}
    for (storage, _, sizes), tensor in views.items():
        size = by_storage.get(storage, 0) + torch.Size(sizes).numel() * tensor.itemsize
        by_storage[storage] = min(size, tensor.untyped_storage().nbytes())
    return sum(by_storage.values())


class _Recorder(TorchDispatchMode):
    """Records ATen's kernels, and which launches of this package's kernels come before each."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches
        self.restart()

    def restart(self) -> None:
        self.first = len(self.launches)
        self.recorded: list[tuple[int, AtenKernel]] = []

    def kernels(self) -> list[Launch | AtenKernel]:
        """All kernels since the last restart."""
        found: list[Launch | AtenKernel] = []
        at = self.first
        for before, kernel in self.recorded:
            found += self.launches[at:before]
            found.append(kernel)
            at = before
        return found + self.launches[at:]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if launches_a_kernel(func, result):
            named = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            moved = bytes_of(_read(func, named | kwargs)) + bytes_of([result])
            kernel = AtenKernel(f"aten.{func._opname}", moved, _product_sizes(func, args, result))
            self.recorded.append((len(self.launches), kernel))
        return result


def launches_a_kernel(func: Any, result: Any) -> bool:
    """Whether an ATen operation works on the GPU: it neither makes a view nor only allocates."""
    returns, name = func._schema.returns, func._opname
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    computes = any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
    allocates = name.startswith(("empty", "new_empty")) or name in NO_KERNEL
    return func.namespace == "aten" and computes and not is_view and not allocates


def _read(func: Any, named: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operation reads."""
    written = {a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write}
    unread = written if func._opname in OVERWRITES else written & {"out"}
    unread = unread | ({"self"} if func._opname in SHAPE_ONLY else set())
    return [value for name, value in named.items() if name not in unread]


def _product_sizes(func: Any, args: tuple[Any, ...], result: Any) -> tuple[int, ...]:
    packet = getattr(torch.ops.aten, func._opname.rstrip("_"), None)  # addmm_ is not registered
    counted = flop_registry.get(packet)
    if counted is None or not isinstance(result, Tensor) or result.ndim < 2:
        return ()
    factors = [value for value in args if isinstance(value, Tensor)]  # without bmm's dtype
    flops = counted(*factors, out_val=result)
    batch = result.numel() // (result.shape[-2] * result.shape[-1])
    return batch, result.shape[-2], result.shape[-1], flops // (2 * max(result.numel(), 1))
