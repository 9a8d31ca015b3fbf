"""Count the operations that a call dispatches, the CPU's counterpart of kernel launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

Counts = Callable[[str, Any], bool]


class _OperationCounter(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts, self.count = counts, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += self.counts(func.name().split(".")[0], args)
        return func(*args, **(kwargs or {}))


def count_operations(call: Callable[[], Any], counts: Counts = lambda name, args: True) -> int:
    """Number of operations that a call dispatches, including views.

    Args:
        call: the call. An op of this package counts as one operation.
        counts: decides by name (such as "aten::item") and arguments whether an operation counts.
    """
    with _OperationCounter(counts) as dispatched:
        call()
    return dispatched.count
