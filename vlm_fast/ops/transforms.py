"""Detects the transforms that an op runs under: Dynamo, torch.func, vmap and forward-mode AD.

The private names of torch that this needs are all here; tests check that they exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])

_functorch_level = torch._C._functorch.maybe_current_level
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_tracing = torch._C._is_tracing
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def constant_while_compiling(function: F) -> F:
    """Mark a function that Dynamo runs while it traces; its result becomes a constant.

    Equivalent to ``torch.compiler.assume_constant_result``, without importing Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def in_functorch() -> bool:
    """Whether a transform of torch.func (grad, vmap, ...) is active."""
    return _functorch_level() is not None


def in_plain_eager() -> bool:
    """Whether no dispatch mode, transform, forward-mode AD or tracer of TorchScript is active."""
    return not (
        _dispatch_modes()
        or _functorch_level() is not None
        or forward_ad._current_level >= 0
        or _is_tracing()
    )


def is_batched(grads: Sequence[Tensor]) -> bool:
    """Whether gradients come from ``is_grads_batched=True`` or ``jacobian(vectorize=True)``.

    Both use a legacy vmap, which `in_functorch` does not see.
    """
    return _is_batched(grads[0]) if len(grads) == 1 else any(map(_is_batched, grads))


def in_each(
    call: Callable[..., list[Tensor]], grads: list[Tensor], saved_tensors: list[Any]
) -> Any:
    """``call(grads, saved)`` under the vmap of torch.func instead of the legacy one."""
    own = [_is_batched(grad) for grad in grads]
    whole = [
        torch._remove_batch_dim(grad, 1, 0, 0) if batched else grad
        for grad, batched in zip(grads, own, strict=True)
    ]
    if is_batched(whole):
        raise RuntimeError("vlm_fast: batched gradients inside batched gradients; use torch.func")
    dims = ([0 if batched else None for batched in own], None)
    return [
        torch._add_batch_dim(made, 0, 1) for made in torch.vmap(call, dims)(whole, saved_tensors)
    ]


def refuse_forward_mode(name: str) -> None:
    """Raise RuntimeError in forward-mode AD, where registered ops would give a zero tangent."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            f"vlm_fast.{name}: forward-mode AD (jvp) is not supported; "
            f"use vlm_fast.ops.{name}.reference or vlm_fast.disabled()"
        )


def refuse_double_backward(name: str) -> None:
    """Raise RuntimeError, because the gradient of an op has no gradient itself."""
    raise RuntimeError(
        f"vlm_fast.{name}: double backward is not supported; "
        f"use vlm_fast.ops.{name}.reference or vlm_fast.disabled()"
    )
