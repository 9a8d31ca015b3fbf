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
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from vlm_fast.ops.autocast import without_autocast
from vlm_fast.ops.cost import Cost as Cost
from vlm_fast.ops.cost import nbytes as nbytes
from vlm_fast.ops.docstrings import documented
from vlm_fast.ops.fallback_reasons import FLOATS as FLOATS
from vlm_fast.ops.fallback_reasons import no_kernel_for as no_kernel_for
from vlm_fast.ops.op_call import CallableOp
from vlm_fast.ops.registration import CallPath
from vlm_fast.ops.sample_shapes import with_batch as with_batch

P = ParamSpec("P")
R = TypeVar("R")

OPS: dict[str, Op[..., Any]] = {}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}  # by name


class Op(CallableOp[P, R]):
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
        super().__init__(reference, declared, where)
        self.__doc__ = documented(reference.__doc__ or "", self.signature)
        self.NeedsGrad = namedtuple(f"{self.name}_needs_grad", self.tensors)  # type: ignore[misc]
        self.references: list[Callable[..., Any]] = [reference]
        self.verify: Callable[..., list[Any]] | None = None
        self.results_without_gradient: Callable[[Any], tuple[int, ...]] = lambda needs_grad: ()
        OPS[self.name] = self

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
