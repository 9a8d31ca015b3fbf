"""Calls of an op with the same options: one that equals a checked one needs no checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlm_fast import fallback
from vlm_fast.kernels._host import host
from vlm_fast.kernels._launcher import runs_triton
from vlm_fast.ops.autocast import autocast_device, autocast_values
from vlm_fast.ops.transforms import in_plain_eager

if TYPE_CHECKING:
    from vlm_fast.ops.op_call import CallableOp

MOST = 1024  # calls that are remembered for an op and its options


class PreparedCall:
    """An op with given options, to be called with all tensor arguments by position.

    The result, and every error and warning, is that of ``op(*arguments, **options)``. What was
    answered for a call is remembered by what `describe` tells of its tensors: dtypes, devices,
    shapes and strides.
    """

    def __init__(self, op: CallableOp[..., Any], options: dict[str, Any]) -> None:
        self.op, self.options = op, options
        self._name, self._canonical = op.name, op._canonical
        self._differentiable = not op.returns_indices
        self._not_cast = [not op.autocasts or name in op.not_autocast for name in op.tensors]
        self._answers: dict[bytes, tuple[dict[str, Any], str | None, bool] | None] = {}

    def __call__(self, *args: Any) -> Any:
        found = NotImplemented
        if not torch.compiler.is_compiling():
            found = self.if_known(*args, casts=True)
        return self.op._checked(args, self.options) if found is NotImplemented else found

    def if_known(self, *args: Any, casts: bool = False) -> Any:
        """The result, if the op serves a call like this one and nothing needs more checks.

        Otherwise NotImplemented: in a transform, where the op would fall back, and for wrong
        arguments; under autocast that matters too, unless the op ``casts`` the arguments as it does
        when it is called. Not to be called while compiling.
        """
        return self.in_plain_eager(args, casts) if in_plain_eager() else NotImplemented

    def in_plain_eager(self, args: tuple[Any, ...], casts: bool = False) -> Any:
        """`if_known` where `transforms.in_plain_eager` holds."""
        describe = host.describe
        metadata = None if describe is None else describe(args)
        if metadata is None or fallback.switches.disabled_switch.on:
            return NotImplemented
        try:
            known = self._answers[metadata]
        except KeyError:
            known = self._check(metadata, args)
        if known is None:  # in these dtypes, which autocast may change
            device = autocast_device(args[0])
            cast = casts and self.op.autocasts and torch.is_autocast_enabled(device)
            return self._under_autocast(args, device) if cast else NotImplemented
        settings, casts_on, on_cpu = known
        if casts_on is not None and torch.is_autocast_enabled(casts_on):
            return self._under_autocast(args, casts_on) if casts else NotImplemented
        fallback.fast_calls[self._name] += 1
        if self._canonical is not None:
            args = self._canonical(args)
        if on_cpu:
            return self.op.reference(*args, **settings)
        path = self.op._path
        if metadata[-1] and self._differentiable and torch.is_grad_enabled():
            flat = args if path.list_at is None else path.flatten(args)
            return path.apply((path.count(args), settings), *flat)
        return path.forward(path.none_needed, *args, **settings)[0]

    def _under_autocast(self, args: tuple[Any, ...], device: str) -> Any:
        """The result for arguments that autocast casts, which is disabled for the op itself."""
        cast = autocast_values(args, self._not_cast, torch.get_autocast_dtype(device))
        torch.set_autocast_enabled(device, False)
        try:
            return self.in_plain_eager(tuple(cast))
        finally:
            torch.set_autocast_enabled(device, True)

    def _check(
        self, metadata: bytes, args: tuple[Any, ...]
    ) -> tuple[dict[str, Any], str | None, bool] | None:
        """What is remembered for a call, or None for one that must be checked each time.

        Returns:
            All options, the device whose autocast matters (None if none does), and
            whether the op's CPU form is its reference.
        """
        if len(self._answers) >= MOST:
            self._answers.clear()
        op = self.op
        found = None
        settings = op.served_settings(args, self.options)
        if settings is not None:
            matters = op.autocasts or op.disables_autocast
            casts_on = autocast_device(args[0]) if matters else None
            found = settings, casts_on, op.plain_on_cpu and not runs_triton(args[0])
        self._answers[metadata] = found
        return found
