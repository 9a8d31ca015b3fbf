"""What a call costs besides time: saved bytes, peak memory and host synchronisations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from vlm_fast.devtools.operations import count_operations
from vlm_fast.patching.models import image_token_merge

# Operations that read a value or a size from the device (the last by a masked_select inside).
WAITING = {
    "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::item", "aten::nonzero",
    "aten::masked_select", "aten::masked_scatter_backward",
}  # fmt: skip
# With a boolean mask, these first count its true entries.
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


def saved_bytes(call: Callable[[], Any], arguments: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for backward, beyond the storages of arguments and results.

    Args:
        call: runs forward, and may run backward.
        arguments: of the call, parameters included.
    """
    known = {_storage(t) for t in arguments}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    # Tensors without history are gradients; their memory may be that of a saved tensor already
    # freed.
    results = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.grad_fn is not None]
    known |= {_storage(t) for t in results}
    return sum(size for storage, size in kept.items() if storage not in known)


def _storage(tensor: Tensor) -> int:
    # Not the data pointer, which is 0 on the meta device.
    return tensor.untyped_storage()._cdata


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Peak memory during a call including its results, beyond the memory in use before.

    The call must have run before: memory that is allocated once and kept does not belong to it.
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
    """Bytes of the storages of the tensors in a result."""
    tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    return sum({_storage(t): t.untyped_storage().nbytes() for t in tensors}.values())


def _waits(name: str, args: Any) -> bool:
    by_mask = name in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
    return by_mask or name in WAITING


def host_syncs(call: Callable[[], Any], device: str) -> int:
    """Number of times that a call makes the host wait for the device.

    On CUDA they are counted by torch. On a CPU the operations that would wait on CUDA are counted:
    an op of this package counts as none, and a patched model takes the branches that it takes on
    CUDA. Only a GPU can prove the number.
    """
    if device == "cpu":
        as_on_cuda = mock.patch.object(image_token_merge, "would_sync", lambda count: True)
        with as_on_cuda:
            return count_operations(call, _waits)
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
