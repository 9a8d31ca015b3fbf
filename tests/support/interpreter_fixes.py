"""Corrections of Triton's interpreter for tests, for Triton 3.6 to 3.9.

The interpreter keeps bf16 as uint16 and computes with those integers; here it computes in fp32 and
rounds to nearest even after every operation, as the hardware does. It also lets one NaN operand win
in `tl.maximum` and `tl.minimum` (Triton 3.6), where the hardware returns the number, and its loop
bounds do not work with numpy 2.4. From Triton 3.7 on it refuses a tensor that a module's constant
was multiplied by. Its products are the processor's BLAS's, which sums in another
order in another shape. Races, alignment, shared memory and TF32 remain invisible to it.
"""

from __future__ import annotations

import functools
import math
import os
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder as Builder
from triton.runtime.interpreter import ReduceOps, ScanOps, TensorHandle

ON_BITS = (np.left_shift, np.right_shift, np.bitwise_and, np.bitwise_or, np.bitwise_xor)
COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def apply() -> None:
    """Apply all corrections in this process; call it once, before the first kernel."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("these corrections need a process started with TRITON_INTERPRET=1")
    # A kernel's exp may overflow to Inf, its division may yield NaN: no news to a GPU.
    np.seterr(all="ignore")
    _patch_the_language_once_a_launch()
    _make_types_once()
    _convert_loop_bounds()
    _unwrap_constants()
    _convert_bf16()
    _compute_in_bf16()
    _reduce_in_bf16()
    _ignore_nan_in_extrema()


def is_bf16(value: object) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def widened(handle: TensorHandle) -> TensorHandle:
    """A bf16 handle as fp32, which is exact; other handles unchanged."""
    if not is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def rounded(handle: TensorHandle) -> TensorHandle:
    """An fp32 handle rounded to bf16, to nearest with ties to even."""
    values = np.ascontiguousarray(handle.data, dtype=np.float32)
    bits = values.view(np.uint32)
    halfway = np.uint32(0x7FFF) + ((bits >> 16) & 1)
    nearest = ((bits + halfway) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), nearest), tl.bfloat16)


def _patch_the_language_once_a_launch() -> None:
    # The interpreter does so again in every call of a device function, a third of all its time.
    patch = interpreter._patch_lang
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang = lambda fn: patch(everything)

    def call(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def _make_types_once() -> None:
    """Cache facts about types and shapes, which otherwise take a third of the time."""
    core, known = tl.core, interpreter._get_np_dtype

    @functools.cache
    def numpy_dtype(name):
        return known(seen[name])

    @functools.cache
    def measured(shape):
        return core.constexpr(math.prod(shape)), core.tuple([core.constexpr(n) for n in shape])

    @functools.cache
    def described(element, shape):
        if not shape:
            raise TypeError("0d block_type is forbidden")
        sizes = core.tuple(shape)
        return sizes, core.validate_block_shape(sizes), f"<{sizes}, {element}>"

    def get_np_dtype(dtype):
        seen.setdefault(dtype.name, dtype)
        return numpy_dtype(dtype.name)

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = measured(tuple(type.shape) if type.is_block() else ())

    def block_type(self, element_ty, shape):
        self.element_ty = element_ty
        sizes = tuple(core._unwrap_shape(shape))
        self.shape, self.numel, self.name = described(element_ty.name, sizes)

    def values(self, args, type=None):
        self.values = list(args)
        self._type = core.tuple_type(type) if isinstance(type, (list, tuple)) else type

    def type_of_values(self):
        if self._type is None:
            self._type = core._type_for_tuple_values(self.values)
        return self._type

    seen: dict[str, object] = {}
    interpreter._get_np_dtype = get_np_dtype
    core.tuple.type = property(type_of_values, lambda self, type: setattr(self, "_type", type))
    core.tuple.__init__, core.tensor.__init__ = values, tensor
    core.block_type.__init__ = block_type


def _convert_loop_bounds() -> None:
    # numpy 2.4 refuses int() of an array of one element, which is how Triton 3.6 reads a scalar.
    patch_tensor = interpreter._patch_lang_tensor

    def patch_with_item(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    interpreter._patch_lang_tensor = patch_with_item


def _unwrap_constants() -> None:
    # A constexpr of a module times a tensor is, interpreted, a constexpr that holds a tensor.
    to_tensor = TritonSemantic.to_tensor

    def unwrapped(self, x, *how):  # type: ignore[no-untyped-def]
        return to_tensor(self, x.value if isinstance(x, tl.constexpr) else x, *how)

    TritonSemantic.to_tensor = unwrapped


def _convert_bf16() -> None:
    cast, cast_rounding = Builder.cast_impl, Builder.create_fp_to_fp

    def cast_impl(self, source, target):
        if target.scalar == tl.bfloat16 and not is_bf16(source):
            return rounded(source if source.dtype.scalar == tl.float32 else _to_fp32(source))
        if is_bf16(source) and target.scalar != tl.bfloat16:
            wide = widened(source)
            return wide if target.scalar == tl.float32 else cast(self, wide, target)
        return cast(self, source, target)

    def create_fp_to_fp(self, source, target, rounding):
        if target.scalar == tl.bfloat16 and rounding == ir.ROUNDING_MODE.RTNE:
            return cast_impl(self, source, target)
        return cast_rounding(self, source, target, rounding)

    Builder.cast_impl = cast_impl
    Builder.create_fp_to_fp = create_fp_to_fp
    Builder.get_bf16 = lambda self, value: rounded(self.get_fp32(value))  # absent in Triton 3.6


def _to_fp32(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(handle.data.astype(np.float32), tl.float32)


def _compute_in_bf16() -> None:
    binary, unary, ternary = Builder.binary_op, Builder.unary_op, Builder.ternary_op
    fma, atomic = Builder.create_fma, Builder.create_atomic_rmw

    def binary_op(self, left, right, function):
        if not is_bf16(left) or function in ON_BITS:
            return binary(self, left, right, function)
        result = binary(self, widened(left), widened(right), function)
        return TensorHandle(result.data, tl.int1) if function in COMPARISONS else rounded(result)

    def unary_op(self, value, function):
        result = unary(self, widened(value), function)
        return rounded(result) if is_bf16(value) else result

    def ternary_op(self, first, second, third, function):
        if not is_bf16(second) or function is np.where:
            return ternary(self, first, second, third, function)
        return rounded(ternary(self, widened(first), widened(second), widened(third), function))

    def create_fma(self, x, y, z):
        result = fma(self, widened(x), widened(y), widened(z))
        return rounded(result) if is_bf16(z) else result

    def create_dot(self, left, right, accumulator, *how):
        # In float64, rounded once. The processor's BLAS would sum in an order that depends on the
        # tile's shape, and a score found again in another tile would not be the same; a GPU's is.
        left, right = (widened(t).data.astype(np.float64) for t in (left, right))
        found = np.matmul(left, right) + accumulator.data
        return TensorHandle(found.astype(accumulator.data.dtype), accumulator.dtype.scalar)

    def create_atomic_rmw(self, operation, pointer, value, mask, *how):
        if is_bf16(value):
            if operation != ir.ATOMIC_OP.FADD:
                raise NotImplementedError(f"bf16 atomic {operation}")
            return _atomic_add(pointer, value, mask)
        return atomic(self, operation, pointer, value, mask, *how)

    Builder.binary_op, Builder.unary_op, Builder.ternary_op = binary_op, unary_op, ternary_op
    Builder.create_dot, Builder.create_fma = create_dot, create_fma
    Builder.create_atomic_rmw = create_atomic_rmw


def _atomic_add(pointer: TensorHandle, value: TensorHandle, mask: TensorHandle) -> TensorHandle:
    # One element after the other, since addresses within a block may repeat.
    shape, memory = value.data.shape, interpreter._interpreter
    addresses = np.broadcast_to(pointer.data, shape).flatten()
    active = np.broadcast_to(mask.data, shape).flatten()
    addends = value.data.flatten()
    before = np.zeros_like(addends)
    yes, nothing = np.ones(1, dtype=bool), np.zeros(1, dtype=np.uint16)
    for i in np.flatnonzero(active):
        here = addresses[i : i + 1]
        old = memory.load(here, yes, nothing, np.dtype(np.uint16))
        terms = [widened(TensorHandle(t, tl.bfloat16)).data for t in (old, addends[i : i + 1])]
        memory.store(here, rounded(TensorHandle(sum(terms), tl.float32)).data, yes)
        before[i] = old[0]
    return TensorHandle(before.reshape(shape), tl.bfloat16)


def _reduce_in_bf16() -> None:
    add, extrema, scan = ReduceOps.sum, ReduceOps.min_max, ScanOps.apply_impl

    def sum_pairs(self, tensor):
        # Halves are added and rounded: rounding once would hide a kernel that forgot to widen.
        if not is_bf16(tensor.handle):
            if self.axis is not None:  # NumPy adds in pairs along a contiguous axis only
                moved = np.ascontiguousarray(np.moveaxis(tensor.handle.data, self.axis, -1))
                tensor = self.to_tensor(np.moveaxis(moved, -1, self.axis), tensor.dtype)
            return add(self, tensor)
        handle, axis = tensor.handle, self.axis
        if axis is None:
            handle, axis = TensorHandle(handle.data.reshape(-1), tl.bfloat16), 0
        while (length := handle.data.shape[axis]) > 1:
            left, right = np.split(widened(handle).data, [length // 2], axis)
            handle = rounded(TensorHandle(left + right, tl.float32))
        data = handle.data if self.keep_dims else handle.data.squeeze(axis)
        if self.keep_dims and self.axis is None:
            data = data.reshape([1] * len(tensor.shape))
        return self.to_tensor(data if data.ndim else data.item(), tl.bfloat16)

    def as_bf16(tensor):
        block = tl.block_type(tl.bfloat16, tensor.shape) if tensor.type.is_block() else tl.bfloat16
        return tl.tensor(rounded(tensor.handle), block)

    def min_max(self, tensor, val_reduce_op, idx_reduce_op=None):
        tensor = tensor[0] if isinstance(tensor, tuple) else tensor
        if not is_bf16(tensor.handle):
            return extrema(self, tensor, val_reduce_op, idx_reduce_op)
        wide = self.to_tensor(widened(tensor.handle).data, tl.float32)
        found = extrema(self, wide, val_reduce_op, idx_reduce_op)
        parts = found if isinstance(found, tuple) else (found,)
        narrow = [as_bf16(part) if part.dtype == tl.float32 else part for part in parts]
        return tuple(narrow) if isinstance(found, tuple) else narrow[0]

    def scan_steps(self, tensors):
        if not any(is_bf16(t.handle) for t in tensors):
            return scan(self, tensors)
        flip = lambda t: self.to_tensor(np.flip(t.handle.data, self.axis), t.dtype)  # noqa: E731
        order = [flip(t) for t in tensors] if self.reverse else tensors
        # Step by step through the combine function, whose arithmetic is bf16's by now.
        found = self.generic_scan(order)
        return [flip(t) for t in found] if self.reverse else found

    ReduceOps.sum, ReduceOps.min_max, ScanOps.apply_impl = sum_pairs, min_max, scan_steps


def _ignore_nan_in_extrema() -> None:
    Builder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)
    Builder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)
