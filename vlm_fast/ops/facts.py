"""Compare facts about Python objects: in the compiled extension, or in Python code that is made."""

from __future__ import annotations

import builtins
import functools
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor

from vlm_fast.kernels._host import host

Fact = tuple[str, Any, Any, Any]  # kind, object, key, value
_GLOBALS = {"__builtins__": builtins}  # of the code that is made
# How an object is compared with a key and a value: in Python code, where {0}, {1} and {2} are
# these. The order is that of the enumeration in csrc/launch_facts.h.
KINDS = {
    "item": "{0}[{1}] is {2}",
    "no item": "{1} not in {0}",
    "false item": "not {0}.get({1})",
    "keys": "[*{0}] == [*{2}]",
    "values": "[*{0}.values()] == [*{2}]",
    "length": "len({0}) == {2}",
    "type": "type({0}) is {2}",
    "attribute": "getattr({0}, {1}) is {2}",
    "equal attribute": "getattr({0}, {1}) == {2}",
    "false attribute": "not getattr({0}, {1}, False)",
    "call": "{0}(*{1}) is {2}",
    "tensor": "(type({0}), {0}.dtype, {0}.shape, {0}.stride(), {0}.device) == {2}",
}


def compared(facts: Sequence[Fact]) -> Callable[[], bool]:
    """A function without arguments: whether all facts hold. A missing key or attribute is False."""
    if host.module is None:
        return in_python(facts)
    kinds = list(KINDS)
    function: Callable[[], bool] = host.module.Facts(
        tuple([(kinds.index(kind), *rest) for kind, *rest in facts])
    )
    return function


def tensor_description(tensor: Tensor) -> Any:
    """The value of a fact about a tensor's class, dtype, device, shape and strides, or None."""
    if host.describe is None:
        return type(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.device
    found = host.describe((tensor,))
    return None if found is None else found[:-1]  # without requires_grad


def in_python(facts: Sequence[Fact]) -> Callable[[], bool]:
    """The comparison of facts as Python code."""
    names: dict[int, str] = {}
    values: list[Any] = []

    def name_of(value: Any) -> str:
        if id(value) not in names:
            names[id(value)] = f"v{len(values)}"
            values.append(value)
        return names[id(value)]

    tests = [KINDS[kind].format(*map(name_of, of)) for kind, *of in facts]
    return FunctionType(_code(len(values), tuple(tests)), _GLOBALS, None, tuple(values))


@functools.lru_cache(maxsize=64)  # equal modules, such as the layers of a stack, share the code
def _code(count: int, tests: tuple[str, ...]) -> CodeType:
    """The code of a function that takes v0, v1, ..., by default the recorded values."""
    names = ", ".join(f"v{i}" for i in range(count))
    condition = "\n            and ".join(tests)
    source = (
        f"def holds({names}):\n    try:\n        return (\n            {condition}\n"
        "        )\n    except (AttributeError, KeyError):\n        return False\n"
    )
    made: dict[str, Any] = {}
    exec(compile(source, "<facts about modules>", "exec"), made)
    code: CodeType = made["holds"].__code__
    return code
