"""Finds 32-bit multiplications in a kernel's TTIR that can overflow in an address.

A load or store past 2**31 elements needs a large GPU to try; this check needs none. It follows the
definitions back from the offset of each ``tt.addptr``, and accepts a 32-bit product only if its
operands are bounded so that it stays below 2**31: a grid has up to 2**31 - 1 programs along x
but 65,535 along y and z, so ``program_id(1) * BLOCK`` is, and ``program_id(0) * cols`` is not.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

INT32_MAX = 2**31 - 1
GRID = {"x": INT32_MAX, "y": 65_535, "z": 65_535}
VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
OPERATION = re.compile(r'(?:(%[\w$.-]+)(?::(\d+))? = )?"?([a-z_]+\.[\w.]+)"?(.*)')
LOCATION = re.compile(r"\s*loc\((?:[^()]|\([^()]*\))*\)")
LOOP = re.compile(r" (%\S+) = (%\S+) to (%\S+) step %\S+(?: iter_args\((.*?)\) ->)?")
WHILE = re.compile(r" \((.*?)\) : ")


@dataclass(eq=False)
class Value:
    operation: str
    text: str = ""
    operands: list[Value] = field(default_factory=list)

    def bits(self) -> int:
        found = re.findall(r"\bi(\d+)\b|xi(\d+)>", self.text.rpartition(" : ")[2])
        return int("".join(found[-1])) if found else 32

    @cached_property
    def bound(self) -> int:
        """The largest possible value, if sizes and indices are not negative."""
        return min(self.unwrapped, 2 ** (self.bits() - 1) - 1)

    @cached_property
    def unwrapped(self) -> float:
        """The bound without the limit of the type's width."""
        match self.operation, self.operands:
            case "arith.constant", _:
                number = re.search(r"(?:dense<|constant )(-?\d+)[> ]", self.text)
                return abs(int(number[1])) if number else INT32_MAX
            case "tt.get_program_id" | "tt.get_num_programs", _:
                return GRID[re.search(r"_(?:id|programs) ([xyz])", self.text)[1]]
            case "tt.make_range", _:
                return int(re.search(r"end = (\d+)", self.text)[1]) - 1
            case "arith.muli", [a, b]:
                return a.bound * b.bound
            case "arith.shli", [a, b]:
                return a.bound << min(b.bound, 64)
            case "arith.addi", [a, b]:
                return a.bound + b.bound
            case "arith.subi", [a, _]:  # a difference of sizes or indices is one too
                return a.bound
            case "arith.divsi" | "arith.divui", [a, b] if b.operation == "arith.constant":
                return a.bound // max(b.bound, 1)
            case "arith.remsi" | "arith.remui", [a, b]:
                return min(a.bound, b.bound - 1)
            case "arith.minsi" | "arith.minui", [a, b]:
                return min(a.bound, b.bound)
            case "arith.select", [_, a, b]:
                return max(a.bound, b.bound)
            case "arith.extsi" | "arith.trunci" | "tt.splat" | "tt.broadcast" | "tt.expand_dims", [
                a
            ]:
                return a.bound
            case "induction", [_, end]:
                return end.bound
            case _:
                return math.inf


def overflowing_products(ttir: str) -> list[str]:
    """The lines of overflowing products; raises NotImplementedError for unknown control flow."""
    found = {}
    todo = [value.operands[1] for value in parse(ttir) if value.operation == "tt.addptr"]
    seen = set()
    while todo:
        value = todo.pop()
        if id(value) in seen or value.operation in ("tt.load", "tt.addptr"):
            continue  # what is loaded is data; another address is looked at by itself
        seen.add(id(value))
        todo += value.operands
        product = value.operation in ("arith.muli", "arith.shli") and value.bits() <= 32
        if product and value.unwrapped > INT32_MAX:
            found[value.text] = None
    return list(found)


def parse(ttir: str) -> list[Value]:
    """All operations with resolved operands; loop-carried values have a start and a next value."""
    values: list[Value] = []
    names: dict[str, Value] = {}
    regions: list[list[list[Value]]] = []  # by region: the values that its i-th yield reaches
    in_body = False

    def resolve(text: str) -> list[Value]:
        # A name means its last definition above: sibling regions use names again.
        return [names.setdefault(name, Value("argument")) for name in VALUE.findall(text)]

    for line in ttir.splitlines():
        line = LOCATION.sub("", line).strip()
        if line.startswith("}"):
            region = regions.pop()
            if line.endswith("{"):  # else, or the body of a while loop
                regions.append(region)
            in_body = line == "} do {"
            continue
        if in_body:  # the names of what the condition passes on
            in_body = False
            names.update(zip(VALUE.findall(line), (to[0] for to in regions[-1]), strict=True))
            continue
        reached: list[list[Value]] = []
        if (parsed := OPERATION.match(line)) and not line.startswith("tt.func"):
            result, count, operation, rest = parsed.groups()
            if operation.startswith("cf.") or operation == "tt.call":
                raise NotImplementedError(line)
            results = [result] if count is None else [f"{result}#{i}" for i in range(int(count))]
            if operation in ("scf.yield", "scf.condition"):
                passed = resolve(rest)[operation == "scf.condition" :]
                for value, targets in zip(passed, regions[-1], strict=False):
                    for target in targets:
                        target.operands.append(value)
            elif operation in ("scf.for", "scf.if", "scf.while") and line.endswith("{"):
                reached = [[Value(operation)] for _ in results if result]
                starts = None
                if loop := LOOP.match(rest):
                    names[loop[1]] = Value("induction", "", resolve(f"{loop[2]} {loop[3]}"))
                    starts = loop[4] or ""
                elif operation == "scf.while":
                    starts = WHILE.match(rest)[1]
                if starts is not None:
                    carried = re.findall(rf"({VALUE.pattern}) = ({VALUE.pattern})", starts)
                    for targets, (name, start) in zip(reached, carried, strict=True):
                        inside = names[name] = Value("carried", "", resolve(start))
                        targets[0].operands += inside.operands
                        targets.append(inside)
                names.update(zip(results, (targets[0] for targets in reached), strict=False))
            else:
                value = Value(operation, line, resolve(rest))
                values.append(value)
                names.update(dict.fromkeys(results, value))
        if line.endswith("{"):
            regions.append(reached)
    return values
