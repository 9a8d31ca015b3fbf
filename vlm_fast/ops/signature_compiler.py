"""Compiles a declared signature into one predicate, without a loop over the arguments."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from vlm_fast.ops.signature_arguments import HALF, NAMES, Option, TensorArgument

if TYPE_CHECKING:
    from vlm_fast.ops.signature import Signature

ERRORS = "(AttributeError, IndexError, TypeError, ValueError, ZeroDivisionError)"


class Compiler:
    """Writes the source of a predicate that reads each attribute of each tensor once."""

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
