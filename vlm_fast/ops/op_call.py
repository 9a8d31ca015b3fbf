"""How an op is called: its arguments are bound, checked and served, or fall back with a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.utils import _pytree

from vlm_fast.fallback import DISABLED, record_fallback, record_fast_call
from vlm_fast.kernels._launcher import runs_triton
from vlm_fast.ops.autocast import autocast_device, autocast_values
from vlm_fast.ops.fallback_reasons import no_kernel_for, why_not_now
from vlm_fast.ops.op_arguments import OpArguments
from vlm_fast.ops.prepared_call import MOST, PreparedCall
from vlm_fast.ops.registration import CallPath
from vlm_fast.ops.transforms import in_plain_eager

P = ParamSpec("P")
R = TypeVar("R")


class CallableOp(OpArguments[P, R]):
    """An op as it is called; a declaration attaches what it calls."""

    _path: CallPath

    def __init__(
        self, reference: Callable[P, R], declared: Mapping[str, Any], where: Mapping[str, str]
    ) -> None:
        super().__init__(reference, declared, where)
        self.autocasts = False
        self.not_autocast: tuple[str, ...] = ()
        self.disables_autocast = False  # in forward, which calls products of torch
        self.returns_indices = False
        self.plain_on_cpu = False  # no CPU variant gains: the reference is the CPU form
        self._fallback_reason: Callable[..., str | None] | None = None
        self._prepared: dict[Any, PreparedCall] = {}

    def __call__(self, *args: P.args, **options: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not in_plain_eager():
            return self._checked(args, options)
        if len(args) != self._count or not self.defaults.keys() >= options.keys():
            args, options = self._in_position(args, options)  # type: ignore[assignment]
            if len(args) != self._count:
                return self._checked(args, options)
        key: Any = ()
        if options:  # 1, 1.0 and True are equal, but not all of them need be accepted
            key = (*options.items(), *map(type, options.values()))
        try:
            prepared = self._prepared[key]
        except KeyError:
            prepared = self._prepare(key, options)
        except TypeError:  # an option that cannot be hashed
            return self._checked(args, options)
        found = prepared.in_plain_eager(args, casts=True)
        return self._checked(args, options) if found is NotImplemented else found

    def prepared(self, **options: Any) -> PreparedCall:
        """The op with these options, for calls with all tensor arguments by position."""
        return PreparedCall(self, options)

    def _prepare(self, key: Any, options: dict[str, Any]) -> PreparedCall:
        if len(self._prepared) >= MOST:
            self._prepared.clear()
        found = self._prepared[key] = PreparedCall(self, options)
        return found

    def served_settings(
        self, args: tuple[Any, ...], options: dict[str, Any]
    ) -> dict[str, Any] | None:
        """All options of a call that the op serves without its reference; otherwise None.

        It reads no elements, only options and what `describe` tells of tensors.
        """
        try:
            values, settings = self._bind(args, options)
            self.accepted(values, settings)
        except (TypeError, ValueError):
            return None
        return settings if self._why_not(values, settings) is None else None

    def _is_cast(self, first: Any) -> bool:
        """Whether autocast is enabled and matters for a call with this first argument."""
        matters = self.autocasts or self.disables_autocast
        return matters and torch.is_autocast_enabled(autocast_device(first))

    def _checked(self, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """A call that is checked argument by argument, and falls back with a reason."""
        values, settings = self._bind(args, options)
        try:
            if self._is_cast(values[0]):
                return self._under_autocast(self, values, settings)
            if self._has_more_checks or not self._accepts(*values, **settings):
                values = self.accepted(values, settings)
        except (TypeError, ValueError) as error:
            return self._of_proxies(args, options, error)
        reason = self._why_not(values, settings)
        if reason is not None:
            record_fallback(self.name, reason, stacklevel=4)
            return self.reference(*values, **settings)
        if self.plain_on_cpu and not runs_triton(values[0]):
            return self._on_cpu(values, settings)
        return self._path(values, settings)

    def _on_cpu(self, values: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        if not torch.compiler.is_compiling():  # as for the other ops, see `fallback.stats`
            record_fast_call(self.name)
        return self.reference(*values, **settings)

    def fast(self, *args: P.args, **options: P.kwargs) -> R:
        """Call the kernels or, on a CPU, the op's CPU form; never fall back.

        Raises:
            RuntimeError: the kernels cannot serve this call.
        """
        values, settings = self._bind(args, options)
        if self._is_cast(values[0]):
            return self._under_autocast(self.fast, values, settings)
        values = self.accepted(values, settings)
        reason = self._why_not(values, settings)
        if reason is not None and reason is not DISABLED:
            raise RuntimeError(f"vlm_fast.{self.name}: {reason}")
        if self.plain_on_cpu and not runs_triton(values[0]):
            return self._on_cpu(values, settings)
        return self._path(values, settings)

    def why_not(self, *args: P.args, **options: P.kwargs) -> str | None:
        """Why the reference would serve this call instead of the kernels; None if they would."""
        values, settings = self._bind(args, options)
        return self._why_not(self.accepted(values, settings), settings)

    def _why_not(self, values: tuple[Any, ...], settings: dict[str, Any]) -> str | None:
        reason = why_not_now(self.name, values[0])
        if reason is None and self._fallback_reason is not None:
            return self._fallback_reason(*values, **settings)
        return reason or no_kernel_for(values[0])

    def _of_proxies(self, args: tuple[Any, ...], options: dict[str, Any], error: Exception) -> Any:
        """Record the call if a tracer made it with proxies in place of tensors; else raise."""
        proxies = [v for v in _pytree.tree_leaves((args, options)) if isinstance(v, Proxy)]
        if proxies:  # the graph of torch.fx.symbolic_trace calls the op as it calls torch's own
            return proxies[0].tracer.create_proxy("call_function", self, args, options)
        sizes = [name for name, value in options.items() if isinstance(value, Tensor)]
        if torch.jit.is_tracing() and sizes and not set(sizes) & set(self.tensors):
            # torch.jit.trace makes tensors of sizes; it warns that their values are recorded.
            return self(*args, **{**options, **{name: int(options[name]) for name in sizes}})
        raise error

    def _under_autocast(
        self, call: Callable[..., Any], values: tuple[Any, ...], settings: dict[str, Any]
    ) -> Any:
        device = autocast_device(values[0])
        exempt = [not self.autocasts or name in self.not_autocast for name in self.tensors]
        cast = autocast_values(values, exempt, torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return call(*cast, **settings)
