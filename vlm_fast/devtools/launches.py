"""Count the kernels that a call launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def launches(call: Callable[[], Any], device: str) -> int | None:
    """Number of kernels that a call launches, including copies and fills; None on a CPU.

    The call must have run before, because compilation launches kernels too.
    """
    if device == "cpu":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        call()
    on_gpu = (event for event in record.events() if event.device_type.name == "CUDA")
    return sum(1 for _ in on_gpu)
