"""Forward and backward of an op as one call: of the same inputs, with the same upstream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlm_fast.op import Op
from vlm_fast.parity import convert, differentiable, gradients


def with_upstream(
    op: Op[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Leaves that want gradients, and behind them random gradients of the results."""
    leaves = convert(args, lambda t: t.detach().requires_grad_())
    with torch.no_grad():
        results = op(*args, **options)
    results = results if isinstance(results, tuple) else (results,)
    return (*leaves, [torch.randn_like(r) if r.is_floating_point() else None for r in results])


def step(
    function: Callable[..., Any], inputs: tuple[Any, ...], options: Mapping[str, Any]
) -> list[Tensor]:
    """Results and gradients; ``inputs`` end with the upstream gradients."""
    *args, upstream = inputs
    results = function(*args, **options)
    results = results if isinstance(results, tuple) else (results,)
    found = gradients(results, differentiable(args), upstream)
    return [r.detach() for r in results] + [g for g in found if g is not None]
