"""Reads the declaration of one argument of an op, a tensor or an option."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

HALF = (torch.float16, torch.bfloat16)
NAMES = {"len": len, "prod": math.prod, "float32": torch.float32}


@dataclass(frozen=True)
class TensorArgument:
    """One declared tensor.

    Attributes:
        name: of the argument, or of the element of a list.
        dtypes: alternatives as written: "floating", "half", "like x", "int32".
        sizes: expressions, or None for any shape.
        one_element: whether the tensor has exactly one element.
        optional: whether None is accepted.
        is_list: whether this stands for every tensor of a list.
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


def parse_tensor(op: str, name: str, line: str) -> TensorArgument:
    """Read the declaration of a tensor; ValueError if it is malformed."""
    found = re.fullmatch(
        r"(?P<list>list of )?(?P<dtypes>[\w ]+?)(?P<shape> \(.*\)| one element)?"
        r"(?P<none> or None)?",
        line,
    )
    if found is None:
        raise ValueError(f"{op}: {name}={line!r} is no declaration of a tensor")
    dtypes = tuple(found["dtypes"].split(" or "))
    for dtype in dtypes:
        named = dtype in ("floating", "half") or dtype.startswith("like ")
        if not named and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"{op}: {name}={line!r} names no dtype {dtype!r}")
    shape = (found["shape"] or "").strip()
    sizes = None
    if shape.startswith("("):
        sizes = tuple(part.strip() for part in shape[1:-1].split(",") if part.strip())
    return TensorArgument(
        name, dtypes, sizes, shape == "one element", bool(found["none"]), bool(found["list"])
    )


def parse_option(op: str, name: str, line: str | tuple[str, ...]) -> Option:
    """Read the declaration of an option; ValueError if it is malformed."""
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
