"""The signature of an op: dtypes, shapes, devices and options, declared once, a line per argument.

A tensor argument is declared as ``[list of] <dtype> [<shape>] [or None]``::

    x="floating (..., in)"
    weight_1="like x (hidden, in)"
    bias_1="like x or float32 (hidden,) or None"
    key_mask="bool (batch, keys + keys2) or None"
    seed="int64 one element or None"
    match=dict(destination="int32 (batch, tokens)", ...)      a list of tensors, each with a name

A dtype is ``floating`` (any), ``half`` (float16 or bfloat16), ``like <argument>``, or the name of a
torch dtype; ``or`` joins several. A size is a name, a number or an expression of names. The first
tensor with a name binds it, all others must agree. ``...`` stands for any leading sizes, ``*rows``
binds them, and ``1|size`` also accepts 1. All tensors are on the device of the first. The sizes of
an absent optional tensor are 0.

An option is declared as a tuple of choices, ``"int from 1 to 8"`` (either bound may be left out) or
``"number in [0, 1)"``; ``", needs seed"`` says that an option other than 0 needs that argument.

``where`` maps a condition on sizes, arguments and options to ``"<argument>: <what is expected>"``,
in which ``{...}`` is evaluated. A condition on a dtype raises TypeError, any other ValueError.

From this a `Signature` compiles one predicate that is True for the usual valid call. The error
for a wrong call is found by `argument_errors.mistake`, which reads the same declaration.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from vlm_fast.ops.signature_arguments import (
    NAMES,
    TensorArgument,
    parse_option,
    parse_tensor,
)
from vlm_fast.ops.signature_compiler import Compiler


class Signature:
    """The declared arguments of one op, and ``accepts``, the compiled predicate.

    Args:
        op: the op's name, for errors.
        tensors: names of the tensor arguments, in their order.
        options: names of the other arguments.
        declared: the declaration of each argument; options may be left out.
        where: conditions, and what is expected where they fail.

    Raises:
        ValueError: a line cannot be read, or a tensor argument is not declared.
    """

    def __init__(
        self,
        op: str,
        tensors: Sequence[str],
        options: Sequence[str],
        declared: Mapping[str, Any],
        where: Mapping[str, str],
    ) -> None:
        unknown = declared.keys() - {*tensors, *options}
        missing = set(tensors) - declared.keys()
        if unknown or missing:
            raise ValueError(
                f"{op}: arguments declared {sorted(unknown)}, missing {sorted(missing)}"
            )
        self.op, self.where = op, dict(where)
        self.option_names = tuple(options)
        self.tensors: dict[str, TensorArgument | list[TensorArgument]] = {
            name: [parse_tensor(op, n, line) for n, line in declared[name].items()]
            if isinstance(declared[name], Mapping)
            else parse_tensor(op, name, declared[name])
            for name in tensors
        }
        self.options = {n: parse_option(op, n, declared[n]) for n in options if n in declared}
        self._check_names()
        self.accepts: Callable[..., bool] = Compiler(self).compiled()

    def _check_names(self) -> None:
        """Refuse a name that nothing binds: a misspelled size."""
        known = {*self.tensors, *self.option_names, *NAMES}
        for argument in self.flat():
            known.add(argument.name)
            for size in argument.sizes or ():
                plain = size.lstrip("*")
                known |= {plain} if plain.isidentifier() else set()
                self._check_expression(
                    size.removeprefix("1|").lstrip("*").replace("...", "0"), known
                )
        for condition in self.where:
            self._check_expression(condition, known)

    def _check_expression(self, expression: str, known: set[str]) -> None:
        if expression.isidentifier():  # a size, which may be a keyword: "in"
            return
        for node in ast.walk(ast.parse(expression, mode="eval")):
            if isinstance(node, ast.Name) and node.id not in known:
                raise ValueError(f"{self.op}: {node.id} in {expression!r} is bound by no argument")

    def flat(self) -> list[TensorArgument]:
        """Every declared tensor; those of a named list one by one."""
        parts = (a if isinstance(a, list) else [a] for a in self.tensors.values())
        return [argument for part in parts for argument in part]

    def evaluate(self, expression: str, names: Mapping[str, Any]) -> Any:
        """The value of an expression of sizes, arguments and options."""
        if expression.isidentifier():
            return names.get(expression, 0)
        return eval(expression, {"__builtins__": {}, **NAMES}, _Defaults(names))


class _Defaults(dict[str, Any]):
    """Sizes of absent optional tensors are 0."""

    def __missing__(self, name: str) -> int:
        if name in NAMES:
            raise KeyError(name)
        return 0


def canonical_form(signature: Signature) -> Callable[[tuple[Any, ...]], tuple[Any, ...]] | None:
    """A function that turns the sequence or single tensor of a declared list into a list.

    None if no argument is a list.
    """
    at = [
        i for i, declared in enumerate(signature.tensors.values())
        if isinstance(declared, list) or declared.is_list
    ]  # fmt: skip
    if not at:
        return None
    (i,) = at

    def canonical(values: tuple[Any, ...]) -> tuple[Any, ...]:
        value = values[i]
        if isinstance(value, Tensor):
            return (*values[:i], [value], *values[i + 1 :])
        if isinstance(value, tuple):
            return (*values[:i], list(value), *values[i + 1 :])
        return values

    return canonical
