"""Work of one program of a Triton kernel, counted by walking Triton's IR as a program runs it.

Integers that depend on arguments and on the program's number are computed, loops are taken as
often as they run, and every operation on a tensor is added up. A loop whose bounds are loaded from
memory is taken as often as the caller assumes for loops of its depth, and a while loop once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlm_fast.devtools.device_time import ttir
from vlm_fast.devtools.device_time.work import Work

PROGRAMS, ITERATIONS = 9, 3  # at most so many are walked, spread evenly
SHUFFLES = 10  # instructions of a reduction across the threads of a warp
LOADS = {"tt.load", "tt.gather", "tt.descriptor_load", "tt.atomic_rmw"}
STORES = {"tt.store", "tt.descriptor_store"}
_OPERATION = re.compile(r'^(?:(%\w+)(?::(\d+))? = )?"?([a-z_]+\.[\w.]+)"?(.*)$')
_FOR = re.compile(r"(%\w+) = (%[\w#]+) to (%[\w#]+) step (%[\w#]+)(?: iter_args\((.*?)\))?")
Values = list[Any]


class Program:
    """A kernel's TTIR with the arguments of one launch."""

    def __init__(
        self,
        code: str,
        arguments: Mapping[str, Any],
        warps: int,
        unknown_trips: Sequence[float] = (1.0,),
    ) -> None:
        self.lines = ttir.without_locations(code)
        self.start = next(i for i, ln in enumerate(self.lines) if ln.startswith("tt.func public"))
        self.warps, self.unknown_trips, self.once = warps, unknown_trips, False
        self.depth = 0  # of loops around the operation that is counted
        self.arguments: dict[str, Any] = {}
        for name in re.findall(r"%(\w+): ", self.lines[self.start]):
            value = arguments.get(name)
            known = isinstance(value, int) and not isinstance(value, bool)
            self.arguments["%" + name] = value if known else frozenset([name])

    def work(self, grid: Sequence[int]) -> Work:
        """Average over programs that are spread evenly over the grid."""
        total, numbers = Work(), list(_spread(grid))
        for self.numbers in numbers:
            found, _, _ = self._block(self.start + 1, dict(self.arguments))
            total.add(found, 1 / len(numbers))
        return total

    def static_instructions(self) -> float:
        """Instructions of a thread with every loop taken once, and every branch."""
        self.once, self.numbers = True, (0, 0, 0)
        found, _, _ = self._block(self.start + 1, dict(self.arguments))
        self.once = False
        return found.instructions

    def _block(self, at: int, env: dict[str, Any]) -> tuple[Work, int, Values]:
        """Walk to the brace that closes a block; return work, the line of the brace, yields."""
        work, yielded = Work(), []
        while not self.lines[at].startswith("}"):
            match = _OPERATION.match(self.lines[at])
            at += 1
            if match is None:
                continue
            result, count, name, rest = match.groups()
            if name == "scf.for":
                at, values = self._loop(at, rest, env, work)
            elif name == "scf.while":
                at, values = self._while(at, env, work), [None] * int(count or 1)
            elif name == "scf.if":
                at, values = self._branch(at, rest, env, work)
            elif name in ("tt.reduce", "tt.scan"):
                while not self.lines[at].startswith("})"):
                    at += 1
                types = self.lines[at].partition("->")[0]
                work.instructions += self._per_thread(types) + SHUFFLES
                work.steps += 1
                at, values = at + 1, [None] * int(count or 1)
            elif name == "scf.yield":
                yielded = [env.get(n) for n in ttir.NAME.findall(rest)]
                continue
            elif name == "scf.condition":
                continue
            else:
                values = [self._operation(name, rest, env, work)]
            if result:
                env[result] = values[0] if values else None
                env.update({f"{result}#{i}": value for i, value in enumerate(values)})
        return work, at, yielded

    def _loop(self, at: int, rest: str, env: dict[str, Any], work: Work) -> tuple[int, Values]:
        match = _FOR.search(rest)
        assert match is not None, rest
        variable, *bounds, carried = match.groups()
        first, last, step = (env.get(name) for name in bounds)
        pairs = [part.split(" = ") for part in carried.split(", ")] if carried else []
        inner = {**env, **{name: env.get(initial) for name, initial in pairs}}
        trips = self.unknown_trips[min(self.depth, len(self.unknown_trips) - 1)]
        if isinstance(first, int) and isinstance(last, int) and isinstance(step, int):
            trips = max(0, -(-(last - first) // step))
        trips = 1 if self.once else trips
        walked = min(math.ceil(trips), ITERATIONS)
        end = at
        yielded: Values = []
        for i in range(max(walked, 1)):  # a loop that is not taken is walked to find its end
            number = 0 if walked < 2 else round(i * (trips - 1) / (walked - 1))
            known = isinstance(first, int) and isinstance(step, int)
            inner[variable] = first + number * step if known else None  # type: ignore[operator]
            self.depth += 1
            found, end, yielded = self._block(at, dict(inner))
            self.depth -= 1
            found.looped_loads = found.loads
            if walked:
                work.add(found, trips / walked)
            for (name, _), value in zip(pairs, yielded, strict=False):
                inner[name] = value if value == inner[name] or _is_pointer(value) else None
        return end + 1, [inner[name] for name, _ in pairs]

    def _while(self, at: int, env: dict[str, Any], work: Work) -> int:
        """Take a while loop once: its condition and its body."""
        found, at, _ = self._block(at, dict(env))
        work.add(found)
        found, at, _ = self._block(at + 1, dict(env))
        work.add(found)
        return at + 1

    def _branch(self, at: int, rest: str, env: dict[str, Any], work: Work) -> tuple[int, Values]:
        condition = env.get(ttir.NAME.findall(rest)[0])
        blocks = [self._block(at, dict(env))]
        if self.lines[blocks[0][1]].startswith("} else"):
            blocks.append(self._block(blocks[0][1] + 1, dict(env)))
        end = blocks[-1][1]
        taken = 1 if isinstance(condition, int) and not condition else 0
        for found, _, _ in blocks if self.once else blocks[taken : taken + 1]:
            work.add(found)
        return end + 1, blocks[min(taken, len(blocks) - 1)][2]

    def _operation(self, name: str, rest: str, env: dict[str, Any], work: Work) -> Any:
        operands = [env.get(n) for n in ttir.NAME.findall(rest)]
        found: list[frozenset[str]] = [v for v in operands if isinstance(v, frozenset)]
        pointers: frozenset[str] = frozenset().union(*found)
        if name == "tt.get_program_id":
            return self.numbers["xyz".index(rest.split()[0])]
        if name in LOADS or name in STORES:
            size = ttir.elements(rest) * ttir.item_bytes(rest)
            kind = "read" if name in LOADS else "written"
            work.moved[kind, found[0] if found else pointers] += size
            work.instructions += max(1.0, size / 16 / (32 * self.warps))
            work.loads += name in LOADS
            return None
        if name == "tt.dot":
            work.add_product(rest, self.warps)
            return None
        if "tensor<" in rest and name not in ttir.FREE:
            work.instructions += ttir.INSTRUCTIONS.get(name, 1.0) * self._per_thread(rest)
        return pointers or ttir.integer(name, rest, operands)

    def _per_thread(self, types: str) -> float:
        return max(1.0, ttir.elements(types) / (32 * self.warps))


def _is_pointer(value: Any) -> bool:
    return isinstance(value, frozenset)


def _spread(grid: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    x, y, _ = sizes = (*grid, 1, 1)[:3]
    count = math.prod(sizes)
    walked = min(PROGRAMS, count)
    for i in range(walked):
        number = i * (count - 1) // max(walked - 1, 1)
        yield number % x, number // x % y, number // (x * y)
