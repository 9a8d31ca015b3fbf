"""How an op is declared: the reference is the op, and what makes it fast is attached to it.

    @op(x="floating (..., in)", weight="like x (out, in)", activation=("gelu", "silu"))
    def name(x, weight, *, activation="gelu"):    the meaning, the fallback, the documentation

    @name.forward       (needs_grad, x, ..., *, option) -> (result, tensors saved for backward)
    @name.backward      (needs_grad, saved_tensors, dy, *, option) -> a gradient or None per tensor
    @name.cost          (x, ..., *, option) -> Cost of forward and backward
    @name.inputs(usual=, empty=, large=, others=, bench=) over one builder of arguments

    Optional:
    @name.check                  an error for what the declared signature cannot say, or None
    @name.fallback_reason        why the kernels cannot serve a valid call, or None
    @name.non_differentiable     (needs_grad) -> indices of results without a gradient
    @name.alternative_reference  a reference that multiplies in the kernels' order
    @name.verifier               of an `index_op`: judges results for which there is no tolerance
    name.autocast_exempt("x")    of a `linear_op`: arguments that autocast does not cast

`vlm_fast.ops.signature` describes how arguments are declared. ``needs_grad.<argument>`` is True if
that argument needs a gradient; for a list of tensors it holds one bool per tensor, or it is an
empty tuple if none needs one. ``saved_tensors`` can be unpacked only once, so that each tensor is
freed as soon as backward stops using it (unless the graph is retained).

All suites (parity, gradients, compilation, budgets, benchmarks) loop over `OPS`. A new op is two
files, ``kernels/<op>.py`` and ``vlm_fast/ops/<op>.py``, and one import line in ``ops/__init__.py``.
"""

from __future__ import annotations

import inspect
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping
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
from vlm_fast.ops.autocast import autocast_device, without_autocast
from vlm_fast.ops.cost import Cost as Cost
from vlm_fast.ops.cost import nbytes as nbytes
from vlm_fast.ops.docstrings import documented
from vlm_fast.ops.registration import CallPath
from vlm_fast.ops.sample_shapes import with_batch as with_batch
from vlm_fast.ops.signature import Signature, canonical_form
from vlm_fast.ops.transforms import (
    constant_while_compiling,
    in_functorch,
    in_plain_eager,
    refuse_forward_mode,
)

P = ParamSpec("P")
R = TypeVar("R")

OPS: dict[str, Op[..., Any]] = {}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_KNOWN = 1024  # descriptions of checked calls that an op remembers
Known = tuple[dict[str, Any], bool]
NOT_SERVED: Known = ({}, False)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}  # by name


def no_kernel_for(x: Tensor) -> str | None:
    """None, or why no kernel takes a tensor: its dtype or its layout."""
    if x.dtype not in FLOATS:
        return f"{x.dtype} has no kernels here (float32, bfloat16 and float16 have)"
    if x.layout is not torch.strided or x.is_nested:
        return f"the tensor is not dense (layout {x.layout})"
    return None


class Op(Generic[P, R]):
    """An op: ``op(...)`` chooses between ``op.fast(...)``, the kernels, and ``op.reference(...)``.

    Attributes:
        name: of the op, of its two files and of its registration in ``torch.ops.vlm_fast``.
        tensors: names of the tensor arguments.
        defaults: options and their default values.
        signature: what arguments the op accepts.
        references: the reference and alternatives that multiply in another order.
    """

    def __init__(
        self, reference: Callable[P, R], declared: Mapping[str, Any], where: Mapping[str, str]
    ) -> None:
        self.name = reference.__name__
        self.__name__ = self.__qualname__ = self.name
        self.__module__ = reference.__module__
        self.__signature__ = inspect.signature(reference, eval_str=True)
        self.reference = reference
        parameters = list(self.__signature__.parameters.values())
        self.tensors = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
        self.defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        self.signature = Signature(self.name, self.tensors, tuple(self.defaults), declared, where)
        self.__doc__ = documented(reference.__doc__ or "", self.signature)
        self.NeedsGrad = namedtuple(f"{self.name}_needs_grad", self.tensors)  # type: ignore[misc]
        self.autocasts = False
        self.not_autocast: tuple[str, ...] = ()
        self.returns_indices = False
        self.plain_on_cpu = False  # no CPU variant gains: the reference is the CPU form
        self.references: list[Callable[..., Any]] = [reference]
        self.verify: Callable[..., list[Any]] | None = None
        self.results_without_gradient: Callable[[Any], tuple[int, ...]] = lambda needs_grad: ()
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
        self._known: dict[Any, Known] = {}  # calls that were checked
        OPS[self.name] = self

    def __call__(self, *args: P.args, **options: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return self._checked(args, options)
        if len(args) != self._count or not self.defaults.keys() >= options.keys():
            args, options = self._in_position(args, options)  # type: ignore[assignment]
        describe = host.describe
        metadata = None if describe is None or not in_plain_eager() else describe(args)
        if metadata is None or switches.disabled or self._is_cast(args[0]):
            return self._checked(args, options)
        # A call like one that was checked before needs no checks.
        try:
            key = (
                (metadata, *options.items(), *map(type, options.values())) if options else metadata
            )
            known = self._known.get(key)
        except TypeError:  # an option that cannot be hashed
            return self._checked(args, options)
        if known is None:
            known = self._known[key] = self._settings_if_served(args, options)
        if known is NOT_SERVED:
            return self._checked(args, options)
        record_fast_call(self.name)
        settings, on_cpu = known
        values = args if self._canonical is None else self._canonical(args)
        if on_cpu:
            return self.reference(*values, **settings)
        requires_grad = metadata[-1] and not self.returns_indices
        return self._path.in_plain_eager(values, settings, requires_grad)

    def _settings_if_served(self, args: tuple[Any, ...], options: dict[str, Any]) -> Known:
        """All options of a call that needs no fallback, and whether it is the reference's."""
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        try:
            values, settings = self._bind(args, options)
            self.accepted(values, settings)
        except (TypeError, ValueError):
            return NOT_SERVED
        if self._why_not(values, settings) is not None:
            return NOT_SERVED
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
            record_fallback(self.name, reason)
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

    def sample(
        self,
        shape: Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random arguments and options of a declared shape.

        They are made in ``dtype`` and not converted, because a conversion would lose their strides.
        """
        options = {name: value for name, value in shape.items() if name in self.defaults}
        # A size of the builder may be an option too, as the height of a grid is.
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

    def check(self, check: Callable[..., Exception | None]) -> None:
        """Attach ``check(x, ..., *, option)``, which returns the error of a wrong call or None.

        It reads options, dtypes, devices, shapes and strides and no elements: a call that equals a
        checked one in these is not checked again. The same holds for `fallback_reason`.
        """
        self._check = check
        self._has_more_checks = True

    def fallback_reason(self, reason: Callable[..., str | None]) -> None:
        """Attach ``reason(x, ..., *, option)``: why the kernels cannot serve a call, or None."""
        self._fallback_reason = reason

    def forward(self, forward: Callable[..., tuple[Any, tuple[Tensor | None, ...]]]) -> None:
        """Attach the forward: ``(needs_grad, x, ..., *, option) -> (result, saved tensors)``."""
        self._forward = forward
        if self.returns_indices:
            self.backward(lambda needs_grad, saved, *dys, **options: (None,) * len(needs_grad))

    def backward(self, backward: Callable[..., tuple[Any, ...]]) -> None:
        """Attach the backward: a gradient or None for each tensor argument."""
        self._path = CallPath(self, self._forward, backward)

    def non_differentiable(self, indices: Callable[[Any], tuple[int, ...]]) -> None:
        """Attach ``indices(needs_grad)``: results that depend on no input that needs a gradient."""
        self.results_without_gradient = indices

    def autocast_exempt(self, *names: str) -> None:
        """Name tensor arguments of a `linear_op` that autocast does not cast."""
        self.not_autocast = names

    def verifier(self, verify: Callable[..., list[Any]]) -> None:
        """Attach ``verify(results, x, ..., *, option)``, which returns one `Verdict` or more."""
        self.verify = verify

    def alternative_reference(self, reference: Callable[..., R]) -> None:
        """Attach a second reference that multiplies in the kernels' order.

        It rounds differently from the first, and its error is allowed too.
        """
        self.references.append(reference)

    def cost(self, cost: Callable[..., Cost]) -> None:
        """Attach ``cost(x, ..., *, option)``."""
        self._cost = cost

    def cost_of(self, *args: P.args, **options: P.kwargs) -> Cost:
        """FLOPs and bytes of one call."""
        values, settings = self._bind(args, options)
        return self._cost(*values, **settings)

    def inputs(
        self,
        *,
        smallest: Mapping[str, Any],
        usual: Mapping[str, Any],
        others: Iterable[Mapping[str, Any]] = (),
        large: Mapping[str, Any],
        large_along: str = "batch",
        bitwise: bool = False,
        bench: Mapping[str, Mapping[str, Any]],
    ) -> Callable[[Callable[..., tuple[Any, ...]]], None]:
        """Declare the shapes of an op's arguments, over one function that makes the arguments.

        `with_batch` says which size is the number of images or rows.

        Args:
            smallest: A shape with as many sizes of 1 as possible.
            usual: A shape of odd sizes. Tests that need one shape take this.
            others: More shapes for tests: strides, options, borders of tiles.
            large: A shape with more than 2**31 elements, for a GPU.
            large_along: "batch" or "features": along what a part of the large call equals a call of
                that part.
            bitwise: Whether that part is equal bit for bit, as where there is no GEMM.
            bench: Shapes of real models, by name.

        Raises:
            ValueError: No size is the number of images or rows.
        """
        for shape in (smallest, usual, *others, large, *bench.values()):
            with_batch(shape, 1)

        def attach(make: Callable[..., tuple[Any, ...]]) -> None:
            self.make_inputs = make
            self.test_shapes = [smallest, usual, *others]
            self.usual_shape, self.large_shape = usual, large
            self.large_along, self.bitwise = large_along, bitwise
            self.bench_shapes = dict(bench)

        return attach


@constant_while_compiling  # Dynamo of torch 2.11 takes every compilation for an export
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


def op(
    *, where: Mapping[str, str] | None = None, **declared: Any
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declare an op that keeps dtypes as they are under autocast."""
    return lambda reference: Op(without_autocast(reference), declared, where or {})


def index_op(
    *, where: Mapping[str, str] | None = None, **declared: Any
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declare an op whose results are indices, which have no gradient.

    Rounding may change which index is chosen, so there is no tolerance: `Op.verifier` says what is
    right. Nothing is differentiated; the op's reference detaches its arguments.
    """

    def declare(reference: Callable[P, R]) -> Op[P, R]:
        declared_op = Op(without_autocast(reference), declared, where or {})
        declared_op.returns_indices = True
        declared_op._has_more_checks = True
        declared_op._canonical = lambda values: tuple(
            [v.detach() if isinstance(v, Tensor) else v for v in values]
        )
        return declared_op

    return declare


def linear_op(
    *, where: Mapping[str, str] | None = None, **declared: Any
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declare an op that autocast treats like ``nn.Linear``: it computes and returns its dtype."""

    def declare(reference: Callable[P, R]) -> Op[P, R]:
        declared_op = Op(reference, declared, where or {})
        declared_op.autocasts = True
        return declared_op

    return declare
