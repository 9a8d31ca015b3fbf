"""The ``autograd.Function`` of an op in eager mode, which frees saved tensors early in backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm_fast.ops.transforms import in_functorch, is_batched, refuse_double_backward

if TYPE_CHECKING:
    from vlm_fast.ops.registration import CallPath


def autograd_function(path: CallPath) -> type[torch.autograd.Function]:
    """The class whose ``apply((list length, options), *flat arguments)`` calls an op."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: tuple[int, dict[str, Any]], *flat: Any) -> Any:
            count, settings = ctx.call = call
            needs_grad = path.needs_of(ctx.needs_input_grad[1:], count)
            values = flat if path.list_at is None else path.unflatten(flat, count)
            result, saved = path.forward(needs_grad, *values, **settings)
            ctx.save_for_backward(*saved)
            if path.single:
                return result.data if result._is_view() else result
            results = tuple(map(_fresh, result))
            ctx.mark_non_differentiable(
                *[results[i] for i in path.op.results_without_gradient(needs_grad)]
            )
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            if torch.is_grad_enabled():  # create_graph=True
                refuse_double_backward(path.name)
            count, settings = ctx.call
            needs_grad = ctx.needs_input_grad[1:]
            if in_functorch() or is_batched(grads):  # kernels cannot read batched tensors
                saved_tensors = list(ctx.saved_tensors)
                return None, *path.call_registered_backward(
                    list(grads), saved_tensors, settings, count, needs_grad
                )
            # A used-up iterator holds no tensors, and autograd frees them unless the graph is
            # retained. So a tensor is freed before the op allocates the next one.
            saved_tensors = iter(list(ctx.saved_tensors))  # type: ignore[assignment]
            ctx.maybe_clear_saved_tensors()
            return None, *path.gradients(needs_grad, count, saved_tensors, grads, settings)

    Function.__name__ = Function.__qualname__ = f"vlm_fast_{path.name}"
    return Function


def _fresh(result: Tensor) -> Tensor:
    # Autograd forbids in-place work on a view that a Function returned; on nn.Linear's it does not.
    return result.data if result._is_view() else result
