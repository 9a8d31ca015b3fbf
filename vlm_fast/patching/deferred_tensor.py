"""`DeferredTensor`: a tensor with a pending operation that a fused op can take over.

A model's own forward makes such a tensor and hands it on. Where it reaches the operation that a
fused op replaces, the subclass's `shortcut` runs the op. Any other function gets plain tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DeferredTensor(Tensor):
    """Base of the tensor subclasses by which patched models find what their forward makes."""

    @classmethod
    def shortcut(cls, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of the fused op for this call, or None if it is another function."""
        return None

    @classmethod
    def resolve(cls, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The arguments for any other function, after the pending operations have been done."""
        return args, kwargs

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            found = cls.shortcut(func, args, kwargs)
            if found is not None:
                return found
            args, kwargs = cls.resolve(func, args, kwargs)
            return func(*args, **kwargs)
