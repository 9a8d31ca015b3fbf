"""What a call costs besides time: bytes kept for backward, peak memory, waits of the host."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from vlm_fast.devtools.operations import operations
from vlm_fast.patching.models import image_token_merge

# Each reads a value, or a size, from the device (the last by a masked_select inside).
WAITING = {
    "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::item", "aten::nonzero",
    "aten::masked_select", "aten::masked_scatter_backward",
}  # fmt: skip
# With a mask these count its true entries first.
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


def saved_bytes(call: Callable[[], Any], arguments: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for backward, beyond the storages of the arguments and results.

    ``call`` may run its backward too.
    """
    known = {_storage(t) for t in arguments}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    # Gradients have no history; they may lie where something saved has been freed.
    results = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.grad_fn is not None]
    known |= {_storage(t) for t in results}
    return sum(size for storage, size in kept.items() if storage not in known)


def _storage(tensor: Tensor) -> int:
    # Not its address: on the meta device that is 0.
    return tensor.untyped_storage()._cdata


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Largest memory in use during a call, results included, beyond what was in use before it.

    The call must have run before: what is allocated once and kept is not the call's.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    in_use = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    return peak


def result_bytes(result: Any) -> int:
    """Bytes of the storages behind the tensors in a result."""
    tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    return sum({_storage(t): t.untyped_storage().nbytes() for t in tensors}.values())


def _waits(name: str, args: Any) -> bool:
    by_mask = name in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
    return by_mask or name in WAITING


def synchronisations(call: Callable[[], Any], device: str) -> int:
    """How often a call makes the host wait for the device.

    Counted on CUDA. On a CPU these are the operations that would wait there: an op of this package
    counts as one that does not, and a patched model takes the branches it takes on CUDA. Only a GPU
    can prove that.
    """
    if device == "cpu":
        as_on_cuda = mock.patch.object(image_token_merge, "would_sync", lambda count: True)
        with as_on_cuda:
            return operations(call, _waits)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing" in str(warning.message) for warning in caught)
