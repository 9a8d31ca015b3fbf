"""Errors for wrong calls of an op: which argument, what it is, and what was expected."""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from vlm_fast.ops.signature import Signature
from vlm_fast.ops.signature_arguments import HALF, NAMES, TensorArgument

WORDS = {"and", "else", "if", "is", "not", "or", "None"}
# NumPy's numbers are among them; a tensor is not.
INTEGERS: tuple[Any, ...] = (numbers.Integral, torch.SymInt)
NUMBERS: tuple[Any, ...] = (numbers.Real, torch.SymInt, torch.SymFloat)
FLOATING = "a floating dtype (float32, bfloat16 or float16)"


def describe(value: object) -> str:
    """The text for a value in an error message: shape, dtype and device of a tensor."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} on {value.device}"
    return repr(value)


def wrong_value(op: str, argument: str, got: object, expected: str) -> ValueError:
    """A ValueError for one argument of an op."""
    return ValueError(f"vlm_fast.{op}: {argument} is {describe(got)}, expected {expected}")


def wrong_type(op: str, argument: str, got: object, expected: str) -> TypeError:
    """A TypeError for one argument of an op."""
    return TypeError(f"vlm_fast.{op}: {argument} is {describe(got)}, expected {expected}")


def not_a_tensor(op: str, argument: str, got: object) -> TypeError:
    """A TypeError for an argument that must be a tensor."""
    if isinstance(got, Proxy):
        return TypeError(
            f"vlm_fast.{op}: {argument} is a Proxy of torch.fx.symbolic_trace, expected a Tensor, "
            "whose sizes are known. Use torch.export, or a Tracer whose is_leaf_module says that "
            f"{op} is a leaf"
        )
    return TypeError(f"vlm_fast.{op}: {argument} is a {type(got).__name__}, expected a Tensor")


def no_double_backward(name: str) -> RuntimeError:
    """The error for a gradient of a gradient, which ``vlm_fast.<name>`` does not have."""
    return RuntimeError(f"vlm_fast.{name}: double backward is not supported")


def check_tensor(op: str, argument: str, value: object) -> None:
    """Raise TypeError if ``value`` is not a tensor."""
    if not isinstance(value, Tensor):
        raise not_a_tensor(op, argument, value)


def mistake(
    signature: Signature, values: Sequence[Any], options: Mapping[str, Any]
) -> TypeError | ValueError | None:
    """The error of a call that does not match the declaration; None if it does.

    Everything is checked for being a tensor first, then options, shapes, conditions, dtypes and
    devices, so that the error names the first cause.
    """
    return _Call(signature, values, options).mistake()


class _Call:
    """One call that the compiled predicate did not accept."""

    def __init__(
        self, signature: Signature, values: Sequence[Any], options: Mapping[str, Any]
    ) -> None:
        self.signature, self.op, self.options = signature, signature.op, options
        self.arguments = dict(zip(signature.tensors, values, strict=True))
        self.sizes: dict[str, Any] = {}
        self.origin: dict[str, str] = {}  # of a size: the argument that has it first

    def mistake(self) -> TypeError | ValueError | None:
        try:
            self.given = list(self.tensors())
        except _Found as found:
            return found.error
        for errors in (
            self.of_options(), self.of_conditions(of_options=True), self.of_shapes(),
            self.of_dtypes(), self.of_devices(), self.of_conditions(of_options=False),
        ):  # fmt: skip
            for error in errors:
                return error
        return None

    def tensors(self) -> Iterator[tuple[str, TensorArgument, Tensor]]:
        """Label, declaration and value of every tensor that is there."""
        for name, declared in self.signature.tensors.items():
            value = self.arguments[name]
            elements: list[tuple[str, TensorArgument, Any]]
            if isinstance(declared, list):
                names = ", ".join(d.name for d in declared)
                if not isinstance(value, (list, tuple)):
                    raise _Found(not_a_tensor(self.op, f"{name} ({declared[0].name})", value))
                if len(value) != len(declared):
                    expected = f"{len(declared)}: {names}"
                    raise _Found(
                        wrong_value(self.op, f"the length of {name}", len(value), expected)
                    )
                elements = [
                    (f"{name} ({d.name})", d, v) for d, v in zip(declared, value, strict=True)
                ]
            elif declared.is_list:
                if not isinstance(value, (list, tuple)):
                    raise _Found(not_a_tensor(self.op, name, value))
                single = len(value) == 1
                elements = [
                    (name if single else f"{name}[{i}]", declared, v) for i, v in enumerate(value)
                ]
            else:
                elements = [(name, declared, value)]
            for label, argument, element in elements:
                if element is None and argument.optional:
                    continue
                if not isinstance(element, Tensor):
                    raise _Found(not_a_tensor(self.op, label, element))
                yield label, argument, element

    def of_options(self) -> Iterator[TypeError | ValueError]:
        for name, option in self.signature.options.items():
            value = self.options[name]
            if option.choices:
                if value not in option.choices:
                    yield wrong_value(self.op, name, value, option.words)
                continue
            kinds = INTEGERS if option.integer else NUMBERS
            if isinstance(value, bool) or not isinstance(value, kinds):
                yield wrong_type(self.op, name, value, option.words)
            elif not option.least <= value < option.below:
                yield wrong_value(self.op, name, value, option.words)
            elif option.needs is not None and value != 0 and self.arguments[option.needs] is None:
                yield wrong_type(self.op, option.needs, None, f"a tensor, which {name} needs")

    def of_shapes(self) -> Iterator[ValueError]:
        for label, argument, value in self.given:
            expected = self.expected_shape(argument)
            if argument.one_element:
                if value.numel() != 1 or value.ndim > 1:
                    yield wrong_value(self.op, label, value, f"one {argument.dtypes[0]}")
            elif argument.sizes is not None and not self.fits(argument, value):
                yield wrong_value(self.op, label, value, expected)

    def fits(self, argument: TensorArgument, value: Tensor) -> bool:
        """Whether a shape agrees with the sizes so far; binds those that are new."""
        sizes, leading = argument.sizes or (), argument.leading
        fixed = sizes[1:] if leading else sizes
        if value.ndim < len(fixed) or (leading is None and value.ndim > len(fixed)):
            return False
        front = value.ndim - len(fixed)
        if leading and leading[0] == "*":
            rows = tuple(value.shape[:front])
            if self.sizes.setdefault(leading[1:], rows) != rows:
                return False
            self.origin.setdefault(leading[1:], argument.name)
        for size, have in zip(fixed, value.shape[front:], strict=True):
            alternative = size.removeprefix("1|")
            if alternative != size and have == 1:
                continue
            if alternative.isidentifier() and alternative not in self.names():
                self.sizes[alternative] = have
                self.origin[alternative] = argument.name
            elif have != self.value_of(alternative):
                return False
        return True

    def names(self) -> dict[str, Any]:
        return {**self.options, **self.sizes}

    def value_of(self, expression: str) -> Any:
        everything = {**self.elements(), **self.arguments, **self.options, **self.sizes}
        return self.signature.evaluate(expression, everything)

    def elements(self) -> dict[str, Any]:
        return {argument.name: value for _, argument, value in self.given}

    def expected_shape(self, argument: TensorArgument) -> str:
        """The declared shape with the known sizes, and the arguments that they come from."""
        parts, origins = [], {}
        for size in argument.sizes or ():
            plain = size.removeprefix("1|").lstrip("*")
            used = set(re.findall(r"[A-Za-z_]\w*", plain)) - NAMES.keys()
            if size == "..." or not used <= self.names().keys():
                parts.append(size)
                continue
            of_sizes = (self.origin.get(name) for name in sorted(used))
            origins.update(dict.fromkeys(name for name in of_sizes if name))
            value = self.value_of(plain)
            known = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            known = known if plain.isidentifier() else f"{plain} = {known}"
            parts.append(f"1 or {known}" if size.startswith("1|") else known)
        parts = [part for part in parts if part]
        text = f"({', '.join(parts)}{',' * (len(parts) == 1)})"
        others = [name for name in origins if name != argument.name]
        text += f" to match {' and '.join(others)}" if others else ""
        return f"{text}, or None" if argument.optional else text

    def of_conditions(self, *, of_options: bool) -> Iterator[TypeError | ValueError]:
        """Errors of conditions only on options, or of all other conditions."""
        for condition, said in self.signature.where.items():
            names = set(re.findall(r"(?<!['\w.])[A-Za-z_]\w*(?!['\w])", condition)) - WORDS
            if (names <= self.options.keys()) != of_options:
                continue
            try:
                holds = self.value_of(condition)
            except (ZeroDivisionError, AttributeError):
                holds = False
            if not holds:
                name, _, expected = said.partition(": ")
                known = re.sub(r"\{([^}]+)\}", lambda m: str(self.value_of(m[1])), expected)
                everything = {**self.elements(), **self.arguments, **self.options}
                wrong = wrong_type if ".dtype" in condition else wrong_value
                yield wrong(self.op, name, everything[name], known)

    def of_dtypes(self) -> Iterator[TypeError]:
        values = self.elements()
        for label, argument, value in self.given:
            wanted, allowed = [], False
            for dtype in argument.dtypes:
                if dtype == "floating":
                    allowed |= value.is_floating_point()
                    wanted.append(FLOATING)
                elif dtype == "half":
                    allowed |= value.dtype in HALF
                    wanted.append("torch.float16 or torch.bfloat16")
                elif dtype.startswith("like "):
                    other = dtype.removeprefix("like ")
                    if other not in values:  # an optional argument that is absent
                        allowed = True
                        continue
                    allowed |= value.dtype is values[other].dtype
                    wanted.append(f"{values[other].dtype} as {other} has")
                else:
                    allowed |= value.dtype is getattr(torch, dtype)
                    wanted.append(f"torch.{dtype}")
            if not allowed:
                yield wrong_type(self.op, label, value, ", or ".join(wanted))

    def of_devices(self) -> Iterator[ValueError]:
        first, _, reference = self.given[0]
        for label, _, value in self.given:
            if value.device != reference.device:
                yield wrong_value(self.op, label, value, f"{reference.device}, where {first} is")


class _Found(Exception):
    """Carries an error out of a generator."""

    def __init__(self, error: TypeError | ValueError) -> None:
        self.error = error
