"""How autocast applies to an op: its device type, and references that run outside of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from vlm_fast.ops.fallback_reasons import FLOATS
from vlm_fast.ops.transforms import constant_while_compiling

P = ParamSpec("P")
R = TypeVar("R")


def autocast_device(first: Any) -> str:
    """The device type whose autocast applies to a call with this first argument."""
    # Anything but a tensor is refused by the op's own checks later.
    return "cuda" if getattr(first, "is_cuda", False) else "cpu"


@constant_while_compiling  # Dynamo of torch 2.11 does not trace this query
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def without_autocast(reference: Callable[P, R]) -> Callable[P, R]:
    """Wrap a reference so that autocast does not cast its operands."""

    @functools.wraps(reference)
    def plain(*args: P.args, **options: P.kwargs) -> R:
        first: Any = args[0] if args else next(iter(options.values()))
        device = first.device.type
        if not (_has_autocast(device) and torch.is_autocast_enabled(device)):
            return reference(*args, **options)
        with torch.autocast(device, enabled=False):
            return reference(*args, **options)

    return plain


def autocast_values(values: Sequence[Any], exempt: Sequence[bool], dtype: torch.dtype) -> list[Any]:
    """The arguments with their floating tensors in autocast's dtype, but for exempt ones.

    The op casts them itself, because torch.compile skips register_autocast on torch 2.11.
    """

    cast: list[Any] = []
    for value, left in zip(values, exempt, strict=True):
        if not left and isinstance(value, Tensor):
            if value.dtype is not dtype and value.dtype in FLOATS:
                value = value.to(dtype)
        elif not left and isinstance(value, (list, tuple)):
            value = autocast_values(value, [False] * len(value), dtype)
        cast.append(value)
    return cast
