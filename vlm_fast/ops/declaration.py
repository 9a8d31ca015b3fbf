"""How an op is declared: the reference is the op, and what makes it fast is attached to it.

    @op
    def name(x: Tensor, ..., *, option=...) -> Tensor:      the semantics, the fallback, the docs
    @name.accepts    -> canonical positional arguments, or TypeError/ValueError before any launch
    @name.requires   -> None, or why the fast path cannot serve this (valid) call
    @name.forward    (needs, x, ..., *, option) -> (result, tensors that backward needs)
    @name.backward   (needs, kept, dy, *, option) -> one gradient or None per positional argument
    @name.constants  (needs) -> numbers of the results that then have no gradient; none by default
    @name.judges     (results, x, ..., *, option) -> verdicts; of a `discrete_op`, in its place
    @name.rounds_like  plain PyTorch once more, in the kernels' order of products, where that counts
    @name.cost       (x, ..., *, option) -> Cost of the forward and of the backward
    @name.inputs(test=[...], bench={...}) over one builder of arguments

``needs`` has a field per tensor argument: whether its gradient is wanted; of a list of tensors
whether each one's is, or an empty tuple where none is. ``kept`` can be unpacked
once; a tensor of it is freed when the op drops it, unless the graph is retained. Parity, contract,
compile, budget and benchmark suites loop over `OPS`; an op is two files and one import line.
"""

from __future__ import annotations

import functools
import inspect
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.utils import _pytree

from vlm_fast.fallback import DISABLED, record_fallback, switches
from vlm_fast.kernels._triton import AVAILABLE
from vlm_fast.ops.registration import (
    CallPath,
    constant_while_compiling,
    in_functorch,
    refuse_forward_mode,
)

P = ParamSpec("P")
R = TypeVar("R")

OPS: dict[str, Op[..., Any]] = {}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Cost:
    """The least work one call can do: FLOPs and bytes to and from memory, each pass apart."""

    forward_flops: int
    forward_bytes: int
    backward_flops: int
    backward_bytes: int


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class Op(Generic[P, R]):
    """Three callables: ``op(...)`` chooses, ``op.fast(...)`` and ``op.reference(...)`` do not."""

    def __init__(self, reference: Callable[P, R]) -> None:
        self.name = reference.__name__
        self.__doc__ = reference.__doc__
        self.__name__ = self.__qualname__ = self.name
        self.__module__ = reference.__module__
        self.__signature__ = inspect.signature(reference, eval_str=True)
        self.reference = reference
        parameters = self.__signature__.parameters.values()
        self.tensors = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
        self.defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        self.Needs = namedtuple(f"{self.name}_needs", self.tensors)  # type: ignore[misc]
        self.autocasts = False
        self.uncast: tuple[str, ...] = ()
        self.discrete = False
        self.plain_orders: list[Callable[..., Any]] = [reference]
        self.judge: Callable[..., list[Any]] | None = None
        self.constant: Callable[[Any], tuple[int, ...]] = lambda needs: ()
        self._accepts: Callable[..., tuple[Any, ...]] = lambda *args, **options: args
        self._requires: Callable[..., str | None] = lambda *args, **options: None
        OPS[self.name] = self

    def __call__(self, *args: P.args, **options: P.kwargs) -> R:
        values, settings = self._bind(args, options)
        try:
            if self.autocasts and torch.is_autocast_enabled(_autocast_device(values[0])):
                return self._under_autocast(self, values, settings)
            values = self._accepts(*values, **settings)
        except (TypeError, ValueError) as mistake:
            return self._of_stand_ins(args, options, mistake)
        reason = self._why_not(values, settings)
        if reason is not None:
            record_fallback(self.name, reason)
            return self.reference(*values, **settings)
        return self._path(values, settings)

    def fast(self, *args: P.args, **options: P.kwargs) -> R:
        """The kernels, never the reference; raises where they cannot serve the call."""
        values, settings = self._bind(args, options)
        if self.autocasts and torch.is_autocast_enabled(_autocast_device(values[0])):
            return self._under_autocast(self.fast, values, settings)
        values = self._accepts(*values, **settings)
        reason = self._why_not(values, settings)
        if reason is not None and reason is not DISABLED:
            raise RuntimeError(f"vlm_fast.{self.name}: {reason}")
        return self._path(values, settings)

    def why_not(self, *args: P.args, **options: P.kwargs) -> str | None:
        """The reason this call would be served by the reference, or None."""
        values, settings = self._bind(args, options)
        return self._why_not(self._accepts(*values, **settings), settings)

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
            refuse_forward_mode(self.name)  # jvp; the others are served
            return "inside a torch.func transform"
        return self._requires(*values, **settings)

    def _bind(
        self, args: tuple[Any, ...], options: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Every tensor in its position, every option present; tensors may come by keyword."""
        if len(args) == len(self.tensors):
            if not options:
                return args, self.defaults
            if options.keys() <= self.defaults.keys():
                return args, {**self.defaults, **options}
        bound = self.__signature__.bind(*args, **options)
        bound.apply_defaults()
        return bound.args, dict(bound.kwargs)

    def _of_stand_ins(
        self, args: tuple[Any, ...], options: dict[str, Any], mistake: Exception
    ) -> Any:
        """The call of a tracer, whose arguments stand for others; without a tracer raise."""
        proxies = [v for v in _pytree.tree_leaves((args, options)) if isinstance(v, Proxy)]
        if proxies:  # torch.fx.symbolic_trace: its graph calls the op, as it calls torch's own
            return proxies[0].tracer.create_proxy("call_function", self, args, options)
        sizes = [name for name, value in options.items() if isinstance(value, Tensor)]
        if torch.jit.is_tracing() and sizes and not set(sizes) & set(self.tensors):
            # torch.jit.trace makes tensors of sizes; it warns that their values are recorded.
            return self(*args, **{**options, **{name: int(options[name]) for name in sizes}})
        raise mistake

    def _under_autocast(
        self, call: Callable[..., Any], values: tuple[Any, ...], settings: dict[str, Any]
    ) -> Any:
        # By hand: register_autocast is skipped under torch.compile on torch 2.11.
        device = _autocast_device(values[0])
        dtype = torch.get_autocast_dtype(device)

        def to(value: Any) -> Any:
            if isinstance(value, list):
                return [to(v) for v in value]
            return value.to(dtype) if isinstance(value, Tensor) and value.dtype in FLOATS else value

        named = zip(self.tensors, values, strict=True)
        cast = [value if name in self.uncast else to(value) for name, value in named]
        with torch.autocast(device, enabled=False):
            return call(*cast, **settings)

    def sample(
        self,
        shape: Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random arguments, and options, of a named or test shape.

        They are made in ``dtype`` rather than converted: a conversion would lose their strides.
        """
        options = {name: value for name, value in shape.items() if name in self.defaults}
        # A size may be an option too: a grid's.
        taken = inspect.signature(self.make_inputs).parameters
        sizes = {n: value for n, value in shape.items() if n not in options or n in taken}
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return self.make_inputs(**sizes), options
        finally:
            torch.set_default_dtype(before)

    # ---- attached by the declaration ----

    def accepts(self, check: Callable[..., tuple[Any, ...]]) -> None:
        self._accepts = check

    def requires(self, unsupported: Callable[..., str | None]) -> None:
        self._requires = unsupported

    def forward(self, forward: Callable[..., tuple[Any, tuple[Tensor | None, ...]]]) -> None:
        self._forward = forward
        if self.discrete:
            self.backward(lambda needs, kept, *gradients, **options: (None,) * len(needs))

    def backward(self, backward: Callable[..., tuple[Any, ...]]) -> None:
        self._path = CallPath(self, self._forward, backward)

    def constants(self, constant: Callable[[Any], tuple[int, ...]]) -> None:
        """Which results, of several, hang on nothing whose gradient is wanted: ``(needs)``."""
        self.constant = constant

    def leaves_alone(self, *names: str) -> None:
        """Tensor arguments of a linear op that autocast does not cast."""
        self.uncast = names

    def judges(self, judge: Callable[..., list[Any]]) -> None:
        """Of a discrete op: ``judge(results, *args, **options)``, one `parity.Verdict` or more."""
        self.judge = judge

    def rounds_like(self, plain: Callable[..., R]) -> None:
        """The reference in an order of products that rounds otherwise; its error is allowed too."""
        self.plain_orders.append(plain)

    def cost(self, cost: Callable[..., Cost]) -> None:
        self._cost = cost

    def cost_of(self, *args: P.args, **options: P.kwargs) -> Cost:
        """FLOPs and bytes of this call."""
        values, settings = self._bind(args, options)
        return self._cost(*values, **settings)

    def inputs(
        self, test: Iterable[Mapping[str, Any]], bench: Mapping[str, Mapping[str, Any]]
    ) -> Callable[[Callable[..., tuple[Any, ...]]], None]:
        """Name the shapes once: the proof suites take ``test``, the benchmark ``bench``."""

        def attach(make: Callable[..., tuple[Any, ...]]) -> None:
            self.make_inputs, self.test_shapes, self.bench_shapes = make, list(test), dict(bench)

        return attach


@constant_while_compiling  # Dynamo of torch 2.11 takes every compilation for an export
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


def _autocast_device(first: Any) -> str:
    # Not a tensor: said by the op's own checks, which come next.
    return "cuda" if getattr(first, "is_cuda", False) else "cpu"


@constant_while_compiling  # Dynamo of torch 2.11 does not trace what it asks
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _without_autocast(reference: Callable[P, R]) -> Callable[P, R]:
    """The reference as it is outside autocast, which would cast what it multiplies."""

    @functools.wraps(reference)
    def plain(*args: P.args, **options: P.kwargs) -> R:
        first: Any = args[0] if args else next(iter(options.values()))
        device = first.device.type
        if not (_has_autocast(device) and torch.is_autocast_enabled(device)):
            return reference(*args, **options)
        with torch.autocast(device, enabled=False):
            return reference(*args, **options)

    return plain


def op(reference: Callable[P, R]) -> Op[P, R]:
    """Declare an op that leaves dtypes alone under autocast."""
    return Op(_without_autocast(reference))


def discrete_op(reference: Callable[P, R]) -> Op[P, R]:
    """Declare an op that chooses: its results are numbers of things, and have no gradient.

    Rounding may turn a choice, so there is no tolerance for it; `judges` says what is right. Its
    ``accepts`` detaches what it chooses by.
    """
    declared = Op(_without_autocast(reference))
    declared.discrete = True
    return declared


def linear_op(reference: Callable[P, R]) -> Op[P, R]:
    """Declare an op that autocast treats like ``nn.Linear``: computed and returned in its dtype."""
    declared = Op(reference)
    declared.autocasts = True
    return declared
