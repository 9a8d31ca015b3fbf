"""Read single lines of Triton's IR (TTIR): sizes of tensors, costs and values of operations."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

# Operations that cost no instruction, or whose cost is counted with the operation that uses them.
FREE = {
    "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.make_range", "tt.trans", "tt.reshape",
    "tt.join", "tt.split", "tt.unsplat", "tt.bitcast", "tt.make_tensor_descriptor", "ub.poison",
    "arith.constant", "arith.extsi", "arith.extui", "arith.bitcast",
}  # fmt: skip
# Instructions of a thread for one element; 1 for an operation that is not listed.
INSTRUCTIONS = {
    "math.exp": 6.0, "math.exp2": 4.0, "math.log": 8.0, "math.log2": 5.0, "math.sqrt": 8.0,
    "math.rsqrt": 4.0, "math.erf": 32.0, "math.tanh": 24.0, "tt.extern_elementwise": 24.0,
    "arith.divf": 10.0, "tt.precise_divf": 14.0, "tt.precise_sqrt": 12.0, "arith.divsi": 16.0,
    "arith.remsi": 18.0, "arith.divui": 14.0, "arith.remui": 16.0, "tt.mulhiui": 2.0,
    "tt.addptr": 2.0, "arith.extf": 0.5, "arith.truncf": 0.5,
}  # fmt: skip
ITEM_BYTES = {
    "i1": 1, "i8": 1, "i16": 2, "bf16": 2, "f16": 2, "i32": 4, "f32": 4, "i64": 8, "f64": 8
}  # fmt: skip
NAME = re.compile(r"%[\w]+(?:#\d+)?")
_TENSOR = re.compile(r"tensor<((?:\d+x)+)(!tt\.ptr<(\w+)>|\w+)")
_POINTER = re.compile(r"!tt\.ptr<(\w+)>")
_LOCATION = re.compile(r"\s*loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")
_COMPARISONS = {
    "eq": "__eq__", "ne": "__ne__", "slt": "__lt__", "ult": "__lt__", "sle": "__le__",
    "ule": "__le__", "sgt": "__gt__", "ugt": "__gt__", "sge": "__ge__", "uge": "__ge__",
}  # fmt: skip


def without_locations(ttir: str) -> list[str]:
    """The lines without the places in the source from which they come."""
    return [_LOCATION.sub("", line).strip() for line in ttir.splitlines()]


def shapes(line: str) -> list[tuple[int, ...]]:
    """Shapes of all tensor types in a line."""
    return [tuple(map(int, dims.split("x")[:-1])) for dims, _, _ in _TENSOR.findall(line)]


def elements(line: str) -> int:
    """Number of elements of the last tensor type in a line; 1 if there is none."""
    found = shapes(line)
    return math.prod(found[-1]) if found else 1


def item_bytes(line: str, index: int = -1) -> int:
    """Bytes of an element of a tensor type in a line, or of what its pointers point to."""
    found = _TENSOR.findall(line)
    if found:
        _, element, pointed = found[index]
        return ITEM_BYTES.get(pointed or element, 4)
    pointers = _POINTER.findall(line)
    return ITEM_BYTES.get(pointers[-1], 4) if pointers else 4


def integer(name: str, rest: str, operands: Sequence[Any]) -> int | None:
    """The value of an operation on single integers; None if it is not known."""
    if "tensor<" in rest:
        return None
    if name == "arith.constant":
        text = rest.split()[0]
        if text in ("true", "false"):
            return int(text == "true")
        return int(text) if re.fullmatch(r"-?\d+", text) else None
    if name == "arith.select" and len(operands) == 3 and isinstance(operands[0], int):
        chosen = operands[1] if operands[0] else operands[2]
        return chosen if isinstance(chosen, int) else None
    if not operands or not all(isinstance(value, int) for value in operands):
        return None
    a, b = operands[0], operands[-1]
    if name == "arith.cmpi":
        return int(getattr(a, _COMPARISONS[rest.split(",")[0].strip()])(b))
    if name[:9] in ("arith.div", "arith.rem"):
        quotient = int(a / b) if b else 0  # rounded towards zero
        return quotient if "div" in name else a - quotient * b
    if name in ("arith.shrui", "arith.shrsi", "arith.shli"):
        return (a << b if name == "arith.shli" else a >> b) if 0 <= b < 64 else 0
    return {
        "arith.addi": a + b, "arith.subi": a - b, "arith.muli": a * b, "arith.minsi": min(a, b),
        "arith.maxsi": max(a, b), "arith.andi": a & b, "arith.ori": a | b, "arith.xori": a ^ b,
        "arith.extsi": a, "arith.extui": a, "arith.trunci": a, "arith.index_cast": a,
    }.get(name)  # fmt: skip
