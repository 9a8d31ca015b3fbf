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
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

HALF = (torch.float16, torch.bfloat16)
NAMES = {"len": len, "prod": math.prod, "float32": torch.float32}
ERRORS = "(AttributeError, IndexError, TypeError, ValueError, ZeroDivisionError)"


@dataclass(frozen=True)
class TensorArgument:
    """One declared tensor.

    Attributes:
        name: of the argument, or of the element of a list.
        dtypes: alternatives as written: "floating", "half", "like x", "int32".
        sizes: expressions, or None for any shape, or "one element".
        optional: whether None is accepted.
    """

    name: str
    dtypes: tuple[str, ...]
    sizes: tuple[str, ...] | None
    one_element: bool = False
    optional: bool = False
    is_list: bool = False

    @property
    def leading(self) -> str | None:
        """The first size if it stands for any number of sizes: ``...`` or ``*rows``."""
        return self.sizes[0] if self.sizes and self.sizes[0][:1] in (".", "*") else None

    @property
    def shape(self) -> str:
        """The shape as one reads it."""
        if self.one_element:
            return "one element"
        if self.sizes is None:
            return "any shape"
        sizes = [f"{s[2:]} or 1" if s.startswith("1|") else s for s in self.sizes]
        return f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"

    @property
    def words(self) -> str:
        """A line for the documentation: shape, dtype, and whether None is accepted."""
        kinds = [d.replace("like ", "of the dtype of ") for d in self.dtypes]
        kinds = [
            k if k.startswith("of ") else {"half": "float16 or bfloat16"}.get(k, k) for k in kinds
        ]
        shape = self.shape if self.one_element or self.sizes is None else f"``{self.shape}``"
        text = f"{shape}, {' or '.join(kinds)}"
        text = f"list of tensors, each {text}" if self.is_list else text
        return f"{text}; or None" if self.optional else text


@dataclass(frozen=True)
class Option:
    """One declared option: a choice, or a number within bounds."""

    name: str
    choices: tuple[str, ...] = ()
    integer: bool = False
    least: float = -math.inf
    below: float = math.inf
    needs: str | None = None

    @property
    def words(self) -> str:
        if self.choices:
            return f"one of {self.choices}"
        if not self.integer:
            return f"a number in [{self.least:g}, {self.below:g})"
        if self.below < math.inf:
            return f"an int from {self.least:g} to {self.below - 1:g}"
        return "an int" if self.least == -math.inf else f"an int of {self.least:g} or more"


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
        self.accepts: Callable[..., bool] = _Compiler(self).compiled()

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


def parse_tensor(op: str, name: str, line: str) -> TensorArgument:
    """Read one declared line."""
    found = re.fullmatch(
        r"(?P<list>list of )?(?P<dtypes>[\w ]+?)(?P<shape> \(.*\)| one element)?"
        r"(?P<none> or None)?",
        line,
    )
    if found is None:
        raise ValueError(f"{op}: {name}={line!r} is no declaration of a tensor")
    dtypes = tuple(found["dtypes"].split(" or "))
    for dtype in dtypes:
        if dtype not in ("floating", "half") and not dtype.startswith("like "):
            getattr(torch, dtype)
    shape = (found["shape"] or "").strip()
    sizes = None
    if shape.startswith("("):
        sizes = tuple(part.strip() for part in shape[1:-1].split(",") if part.strip())
    return TensorArgument(
        name, dtypes, sizes, shape == "one element", bool(found["none"]), bool(found["list"])
    )


def parse_option(op: str, name: str, line: str | tuple[str, ...]) -> Option:
    """Read one declared option."""
    if isinstance(line, tuple):
        return Option(name, choices=line)
    found = re.fullmatch(r"int(?: from (-?\d+))?(?: to (\d+))?(?:, needs (\w+))?", line)
    if found is not None:
        least, most, needs = found.groups()
        return Option(
            name, (), True, -math.inf if least is None else int(least),
            math.inf if most is None else int(most) + 1, needs,
        )  # fmt: skip
    found = re.fullmatch(r"number in \[(\S+), (\S+)\)(?:, needs (\w+))?", line)
    if found is None:
        raise ValueError(f"{op}: {name}={line!r} is no declaration of an option")
    return Option(name, (), False, float(found[1]), float(found[2]), found[3])


class _Compiler:
    """Writes the source of the predicate: each attribute of each tensor is read once."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.lines: list[str] = []
        self.bound: set[str] = set()
        self.shapes: dict[tuple[str, ...], str] = {}
        self.recording = True  # not inside a block that runs for some calls only
        self.constants: dict[str, Any] = dict(NAMES)

    def compiled(self) -> Callable[..., bool]:
        signature = self.signature
        flat = signature.flat()
        first = flat[0].name
        for argument in signature.tensors.values():
            if isinstance(argument, list):
                parent = next(n for n, a in signature.tensors.items() if a is argument)
                names = ", ".join(element.name for element in argument)
                self.lines.append(f"{names}, = {parent}")
        liked = {d.removeprefix("like ") for a in flat for d in a.dtypes if d.startswith("like ")}
        self.read = {first, *liked} - {a.name for a in flat if a.optional}
        self.lines += [f"d_{name} = {name}.dtype" for name in sorted(self.read)]
        self.lines.append(f"device = {first}.device")
        for argument in flat:
            self.tensor(argument, first)
        for option in signature.options.values():
            self.option(option)
        for condition in signature.where:
            self.require(self.renamed(condition))
        arguments = ", ".join(signature.tensors)
        if signature.option_names:
            arguments += f", *, {', '.join(signature.option_names)}"
        text = "\n".join(self.lines)
        slices = {line for line in self.lines if re.match(r"s_\w+ = \w+\[:", line)}
        unused = {line for line in slices if len(re.findall(rf"\b{line.split()[0]}\b", text)) == 1}
        body = "\n".join(f"        {line}" for line in self.lines if line not in unused)
        source = (
            f"def accepts({arguments}):\n    try:\n{body}\n        return True\n"
            f"    except {ERRORS}:\n        return False\n"
        )
        made: dict[str, Any] = {}
        exec(compile(source, f"<signature of {signature.op}>", "exec"), self.constants, made)
        accepts: Callable[..., bool] = made["accepts"]
        return accepts

    def require(self, *conditions: str) -> None:
        self.lines.append(f"if not ({' and '.join(conditions)}): return False")

    def tensor(self, argument: TensorArgument, first: str) -> None:
        name = argument.name
        if argument.is_list:
            inner = TensorArgument("element", argument.dtypes, argument.sizes)
            block = self.block(inner)
            self.lines += [f"for element in {name}:", *(f"    {line}" for line in block)]
            return
        if not argument.optional:
            self.checks(argument, first)
            return
        known = set(self.bound)
        block = self.block(argument)
        self.lines += [f"s_{size} = 0" for size in sorted(self.bound - known)]
        self.lines += [f"if {name} is not None:", *(f"    {line}" for line in block)]

    def block(self, argument: TensorArgument) -> list[str]:
        """The checks of an argument as lines of their own."""
        before, self.lines, self.recording = self.lines, [], False
        self.checks(argument, "")
        block, self.lines, self.recording = self.lines, before, True
        return block

    def checks(self, argument: TensorArgument, first: str) -> None:
        name = argument.name
        conditions = [self.dtype(argument, self.dtype_of(name))]
        if name != first:
            conditions.append(f"{name}.device == device")
        if argument.one_element:
            conditions += [f"{name}.numel() == 1", f"{name}.ndim < 2"]
        elif argument.sizes is not None:
            conditions += self.shape(name, argument.sizes)
        self.require(*conditions)

    def dtype_of(self, name: str) -> str:
        return f"d_{name}" if name in self.read else f"{name}.dtype"

    def dtype(self, argument: TensorArgument, value: str) -> str:
        def one(dtype: str) -> str:
            if dtype == "floating":
                return f"{value}.is_floating_point"
            if dtype == "half":
                self.constants["HALF"] = HALF
                return f"{value} in HALF"
            if dtype.startswith("like "):
                return f"{value} is {self.dtype_of(dtype.removeprefix('like '))}"
            self.constants[dtype] = getattr(torch, dtype)
            return f"{value} is {dtype}"

        return f"({' or '.join(map(one, argument.dtypes))})"

    def shape(self, name: str, sizes: tuple[str, ...]) -> list[str]:
        """Conditions on a shape; sizes seen for the first time are bound before them."""
        if sizes in self.shapes:
            return [f"{name}.shape == {self.shapes[sizes]}"]
        leading = sizes[0] if sizes and sizes[0][0] in ".*" else None
        fixed = sizes[1:] if leading else sizes
        new = [s for s in fixed if s.isidentifier() and self.is_new(s)]
        whole = leading is None or (leading[0] == "*" and not self.is_new(leading[1:]))
        if whole and not new and not any("|" in s for s in fixed):
            parts = [f"*s_{leading[1:]}"] if leading else []
            parts += [self.renamed(s) for s in fixed]
            if parts == [f"*s_{(leading or ' ')[1:]}"]:
                return [f"{name}.shape == s_{(leading or '')[1:]}"]
            return [f"{name}.shape == ({', '.join(parts)},)"]
        self.lines.append(f"h_{name} = {name}.shape")
        if self.recording:
            self.shapes[sizes] = f"h_{name}"
        targets, conditions = [], []
        for i, size in enumerate(fixed):
            if size in new and size not in self.bound:
                self.bound.add(size)
                targets.append(f"s_{size}")
                continue
            targets.append(f"h_{name}_{i}")
            alternative = size.removeprefix("1|")
            equal = f"h_{name}_{i} == {self.renamed(alternative)}"
            conditions.append(equal if alternative == size else f"(h_{name}_{i} == 1 or {equal})")
        if leading is None:
            self.lines.append(f"{', '.join(targets)}, = h_{name}")
            return conditions
        self.lines += [f"{t} = h_{name}[{i - len(fixed)}]" for i, t in enumerate(targets)]
        if leading[0] == "*" and leading[1:] not in self.bound:
            self.bound.add(leading[1:])
            self.lines.append(f"s_{leading[1:]} = h_{name}[:{-len(fixed) or ''}]")
        elif leading[0] == "*":
            conditions.append(f"h_{name}[:{-len(fixed) or ''}] == s_{leading[1:]}")
        return conditions

    def is_new(self, size: str) -> bool:
        return size not in self.bound and size not in self.signature.option_names

    def option(self, option: Option) -> None:
        name = option.name
        if option.choices:
            self.constants[f"choices_{name}"] = option.choices
            self.require(f"{name} in choices_{name}")
            return
        conditions = [f"type({name}) is int"] if option.integer else []
        if option.least > -math.inf:
            conditions.append(f"{name} >= {option.least:g}")
        if option.below < math.inf:
            conditions.append(f"{name} < {option.below:g}")
        if option.needs is not None:
            conditions.append(f"({name} == 0 or {option.needs} is not None)")
        self.require(*conditions)

    def renamed(self, expression: str) -> str:
        """The expression with sizes under their names in the generated source."""
        if expression.isidentifier():
            return f"s_{expression}" if expression in self.bound else expression
        tree = ast.parse(expression, mode="eval")
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in self.bound:
                node.id = f"s_{node.id}"
        return f"({ast.unparse(tree)})"
