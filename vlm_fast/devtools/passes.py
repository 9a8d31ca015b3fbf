"""Forward and backward of an op as calls with the same inputs and upstream gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlm_fast.ops.declaration import Op
from vlm_fast.verification.tolerance import convert, differentiable, gradients


def with_upstream(
    op: Op[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Arguments that require gradients, followed by random upstream gradients of the results."""
    leaves = convert(args, lambda t: t.detach().requires_grad_())
    with torch.no_grad():
        results = op(*args, **options)
    results = results if isinstance(results, tuple) else (results,)
    return (*leaves, [torch.randn_like(r) if r.is_floating_point() else None for r in results])


def _forward(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    def forward(*args: Any) -> Any:
        with torch.no_grad():
            return function(*args, **options)

    return forward


def _results(function: Callable[..., Any], args: Any, options: Mapping[str, Any]) -> Any:
    results = function(*args, **options)
    return results if isinstance(results, tuple) else (results,)


def _both(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    def both(*inputs: Any) -> Any:
        *args, upstream = inputs
        return gradients(_results(function, args, options), differentiable(args), upstream)

    return both


def _backward(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Backward alone, repeated through one retained graph per set of inputs."""
    graphs: dict[int, tuple[Any, ...]] = {}

    def backward(*inputs: Any) -> Any:
        *args, upstream = inputs
        if id(upstream) not in graphs:
            # torch.compile frees its saved tensors in the first backward unless donated_buffer is
            # False.
            with torch._functorch.config.patch(donated_buffer=False):
                graphs[id(upstream)] = _results(function, args, options)
        results = graphs[id(upstream)]
        pairs = [(r, g) for r, g in zip(results, upstream, strict=True) if r.requires_grad]
        taken, given = zip(*pairs, strict=True)
        return torch.autograd.grad(
            taken, differentiable(args), given, allow_unused=True, retain_graph=True
        )

    return backward


MODES = ("forward", "backward", "forward+backward")
CALLS = {"forward": _forward, "backward": _backward, "forward+backward": _both}


def step(
    function: Callable[..., Any], inputs: tuple[Any, ...], options: Mapping[str, Any]
) -> list[Tensor]:
    """Results and gradients of one forward and backward.

    Args:
        function: an op or an alternative to it.
        inputs: arguments followed by upstream gradients, see `with_upstream`.
        options: keyword arguments.
    """
    *args, upstream = inputs
    results = _results(function, args, options)
    found = gradients(results, differentiable(args), upstream)
    return [r.detach() for r in results] + [g for g in found if g is not None]
