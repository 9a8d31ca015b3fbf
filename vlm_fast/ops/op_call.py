"""How an op is called: its arguments are bound, checked and served, or fall back with a reason."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.utils import _pytree

from vlm_fast.fallback import DISABLED, record_fallback, record_fast_call, switches
from vlm_fast.kernels._host import host
from vlm_fast.kernels._launcher import runs_triton
from vlm_fast.kernels._triton import AVAILABLE
from vlm_fast.ops.argument_errors import mistake
from vlm_fast.ops.autocast import autocast_device
from vlm_fast.ops.known_calls import KnownCalls
from vlm_fast.ops.registration import CallPath
from vlm_fast.ops.signature import Signature, canonical_form
from vlm_fast.ops.transforms import (
    constant_while_compiling,
    in_functorch,
    in_plain_eager,
    refuse_forward_mode,
)

P = ParamSpec("P")
R = TypeVar("R")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def no_kernel_for(x: Tensor) -> str | None:
    """None, or why no kernel takes a tensor: its dtype or its layout."""
    if x.dtype not in FLOATS:
        return f"{x.dtype} has no kernels here (float32, bfloat16 and float16 have)"
    if x.layout is not torch.strided or x.is_nested:
        return f"the tensor is not dense (layout {x.layout})"
    return None


class CallableOp(Generic[P, R]):
    """An op as it is called; a declaration attaches what it calls.

    Attributes:
        name: of the op.
        reference: the op in plain PyTorch.
        signature: what arguments the op accepts.
        tensors: names of the tensor arguments.
        defaults: options and their default values.
    """

    _path: CallPath

    def __init__(
        self, reference: Callable[P, R], declared: Mapping[str, Any], where: Mapping[str, str]
    ) -> None:
        self.reference = reference
        self.name = self.__name__ = self.__qualname__ = reference.__name__
        self.__module__ = reference.__module__
        self.__signature__ = inspect.signature(reference, eval_str=True)
        parameters = list(self.__signature__.parameters.values())
        self.tensors = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
        self.defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        self.signature = Signature(self.name, self.tensors, tuple(self.defaults), declared, where)
        self.autocasts = False
        self.not_autocast: tuple[str, ...] = ()
        self.returns_indices = False
        self.plain_on_cpu = False  # no CPU variant gains: the reference is the CPU form
        self._accepts = self.signature.accepts
        self._check: Callable[..., Exception | None] | None = None
        self._fallback_reason: Callable[..., str | None] | None = None
        self._canonical = canonical_form(self.signature)
        self._has_more_checks = self._canonical is not None
        self._count = len(self.tensors)
        self._tensor_defaults = {
            p.name: p.default
            for p in parameters
            if p.name in self.tensors and p.default is not p.empty
        }
        self._known = KnownCalls(self.served_by)

    def __call__(self, *args: P.args, **options: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return self._checked(args, options)
        if len(args) != self._count or not self.defaults.keys() >= options.keys():
            args, options = self._in_position(args, options)  # type: ignore[assignment]
            if len(args) != self._count:
                return self._checked(args, options)
        describe = host.describe
        metadata = None if describe is None or not in_plain_eager() else describe(args)
        if metadata is None or switches.disabled or self._is_cast(args[0]):
            return self._checked(args, options)
        known = self._known.find(metadata, args, options)
        if known is None:
            return self._checked(args, options)
        record_fast_call(self.name)
        settings, on_cpu = known
        values = args if self._canonical is None else self._canonical(args)
        if on_cpu:
            return self.reference(*values, **settings)
        requires_grad = metadata[-1] and not self.returns_indices
        return self._path.in_plain_eager(values, settings, requires_grad)

    def served_by(
        self, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[dict[str, Any], bool] | None:
        """All options of a call, and whether its CPU form is the reference; None if it is not fast.

        It reads no elements, only options and what `describe` tells of tensors.
        """
        try:
            values, settings = self._bind(args, options)
            self.accepted(values, settings)
        except (TypeError, ValueError):
            return None
        if self._why_not(values, settings) is not None:
            return None
        return settings, self.plain_on_cpu and not runs_triton(values[0])

    def _is_cast(self, first: Any) -> bool:
        """Whether autocast casts the arguments of a call with this first one."""
        return self.autocasts and torch.is_autocast_enabled(autocast_device(first))

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

    def accepted(self, values: tuple[Any, ...], settings: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments in canonical form: sequences as lists, detached for an `index_op`.

        Raises:
            TypeError, ValueError: the arguments do not match the declared signature.
        """
        if self._canonical is not None:
            values = self._canonical(values)
        if not self._accepts(*values, **settings):
            error: Exception | None = mistake(self.signature, values, settings)
            if error is not None:
                raise error
        if self._check is not None:
            error = self._check(*values, **settings)
            if error is not None:
                raise error
        return values

    def _why_not(self, values: tuple[Any, ...], settings: dict[str, Any]) -> str | None:
        first = values[0]
        if switches.disabled:
            return DISABLED
        if first.is_cuda:
            if not AVAILABLE:
                return "Triton is not installed"
        elif not (first.is_cpu or first.is_meta):
            return f"device {first.device.type!r} has no kernels here"
        if _is_exporting():
            return "an exported program holds plain PyTorch"
        if torch.jit.is_tracing():
            return "a program that torch.jit.trace records holds plain PyTorch"
        if in_functorch():
            refuse_forward_mode(self.name)  # jvp is refused; the other transforms are served
            return "inside a torch.func transform"
        if self._fallback_reason is None:
            return no_kernel_for(first)
        return self._fallback_reason(*values, **settings)

    def _bind(
        self, args: tuple[Any, ...], options: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Every tensor in its position and every option by name; tensors may come by keyword."""
        if len(args) != self._count or not self.defaults.keys() >= options.keys():
            args, options = self._in_position(args, options)
        if len(args) == self._count:
            if not options:
                return args, self.defaults
            if options.keys() <= self.defaults.keys():
                return args, {**self.defaults, **options}
        bound = self.__signature__.bind(*args, **options)
        bound.apply_defaults()
        return bound.args, dict(bound.kwargs)

    def _in_position(
        self, args: tuple[Any, ...], options: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Tensors that were named or left out in their positions; nothing moves in a wrong call."""
        rest, filled = dict(options), list(args)
        for name in self.tensors[len(args) :]:
            if name in rest:
                filled.append(rest.pop(name))
            elif name in self._tensor_defaults:
                filled.append(self._tensor_defaults[name])
            else:
                return args, dict(options)
        return tuple(filled), rest

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
        # Cast here: register_autocast is skipped under torch.compile on torch 2.11.
        device = autocast_device(values[0])
        dtype = torch.get_autocast_dtype(device)

        def to(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [to(v) for v in value]
            return value.to(dtype) if isinstance(value, Tensor) and value.dtype in FLOATS else value

        named = zip(self.tensors, values, strict=True)
        cast = [value if name in self.not_autocast else to(value) for name, value in named]
        with torch.autocast(device, enabled=False):
            return call(*cast, **settings)


@constant_while_compiling  # Dynamo of torch 2.11 takes every compilation for an export
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()
