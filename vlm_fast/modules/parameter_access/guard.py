"""Record facts about modules, and tell in a few microseconds whether all of them still hold.

Whether parameters may be read directly depends on classes and their code, hooks, children,
parameters and settings. A `Guard` records them and compiles one function that compares them all.
"""

from __future__ import annotations

import builtins
import functools
from collections.abc import Callable, Iterable
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as _nn_module

from vlm_fast.modules.parameter_access.module_calls import HOOKS
from vlm_fast.modules.parameter_access.original_code import class_before_patch, own_methods
from vlm_fast.modules.parameter_access.recordable import (
    is_recordable,
    plain_attributes,
    with_containers,
)

_GLOBAL_HOOKS = tuple(f"_global{kind}" for kind in HOOKS)
_GLOBALS = {"__builtins__": builtins}  # of the compiled tests


class Guard:
    """Facts about modules, to be compiled into one test of whether all of them still hold.

    Attributes:
        is_complete: False if something cannot be recorded: a class with its own attribute lookup,
            or a parameter that is not a plain nn.Parameter, is on the meta device or is managed by
            ZeRO-3. The answer must then be asked for at every call.
    """

    def __init__(self, owner: Any, modules: Iterable[nn.Module], *, methods: bool = False) -> None:
        """Record the facts about a module that is being called, and about modules inside it.

        Args:
            owner: its children, parameters and settings are recorded, but not its hooks.
            modules: modules whose parameters and settings are read instead of calling them. The
                containers between the owner and them are recorded too.
            methods: record all methods of their classes, not only ``forward`` and ``__call__``.
        """
        self._tests: list[str] = []
        self._values: dict[int, tuple[str, Any]] = {}
        modules = with_containers(owner, modules)
        self.is_complete = all(map(is_recordable, (owner, *modules)))
        if not self.is_complete:
            return
        for name in _GLOBAL_HOOKS:
            self.test("not {0}[{1}]", vars(_nn_module), name)
        self._record(owner)
        self.test("[*{0}] == {1}", owner._modules, list(owner._modules))
        for module in modules:
            self._record_call(module)
            self._record(module)
        for kind in {class_before_patch(module): None for module in (owner, *modules)}:
            self._record_code(kind, methods)

    def test(self, condition: str, *values: Any) -> None:
        """Add a condition, in which ``{0}``, ``{1}``, ... stand for the values."""
        self._tests.append(condition.format(*map(self._name, values)))

    def include(self, other: Any, key: str) -> None:
        """Record that the answer that is stored under ``key`` on another module is unchanged."""
        found = other.__dict__.get(key)
        if found is None or found.answer is None:
            self.is_complete = False
        else:
            self.test("{0}()", found.holds)

    def record_modes(self, *modules: nn.Module) -> None:
        """Record whether these modules are in training mode."""
        for module in modules:
            self.test("{0}['training'] is {1}", module.__dict__, module.training)

    def compiled(self) -> Callable[[], bool]:
        """A function without arguments: whether all facts still hold."""
        names = tuple(name for name, _ in self._values.values())
        values = tuple(value for _, value in self._values.values())
        return FunctionType(_code(names, tuple(self._tests)), _GLOBALS, None, values)

    def _name(self, value: Any) -> str:
        name = f"v{len(self._values)}"
        return self._values.setdefault(id(value), (name, value))[0]

    def _record_call(self, module: nn.Module) -> None:
        """Record what a call of the module would do besides the forward of its class."""
        own = module.__dict__
        for kind in HOOKS:
            if own[kind]:
                self.test("[*{0}[{1}].values()] == {2}", own, kind, list(own[kind].values()))
            else:
                self.test("not {0}[{1}]", own, kind)
        for name in ("forward", "_compiled_call_impl"):
            if name in own:
                self.test("{0}[{1}] is {2}", own, name, own[name])
            else:
                self.test("{0} not in {1}", name, own)

    def _record(self, module: nn.Module) -> None:
        """Record the class, the children, the parameters and the settings of a module."""
        own = module.__dict__
        children, parameters = own["_modules"], own["_parameters"]
        self.test("type({0}) is {1}", module, type(module))
        if children:  # compares identities: modules have no other equality
            self.test("{0}['_modules'] is {1}", own, children)
            self.test("[*{0}.values()] == {1}", children, list(children.values()))
        if parameters:
            self.test("{0}['_parameters'] is {1}", own, parameters)
            self.test("len({0}) == {1}", parameters, len(parameters))
        for name in (*children, *parameters):  # an attribute would hide it
            self.test("{0} not in {1}", name, own)
        known = [p for p in parameters.values() if p is not None]
        for name, parameter in parameters.items():
            self.test("{0}[{1}] is {2}", parameters, name, parameter)
        for parameter in known:
            self._record_parameter(parameter)
        for parameter in known[:1]:  # PyTorch refuses parameters on different devices
            self.test("{0}.device == {1}", parameter, parameter.device)
        for name, value in plain_attributes(module):
            self.test("{0}[{1}] is {2}", own, name, value)

    def _record_parameter(self, parameter: Tensor) -> None:
        """Record what may change without the parameter becoming another object.

        Sizes are compared by their product, which is quicker to read. Code that swaps two tensors
        swaps their attributes too.
        """
        own = parameter.__dict__  # to which ZeRO-3 adds its state
        self.test("{0}.__dict__ is {1}", parameter, own)
        self.test("len({0}) == {1}", own, len(own))
        self.test("{0}.dtype is {1}", parameter, parameter.dtype)
        self.test("{0}.nbytes == {1}", parameter, parameter.nbytes)

    def _record_code(self, kind: type[nn.Module], methods: bool) -> None:
        names = [name for name, _ in own_methods(kind)] if methods else []
        for name in dict.fromkeys(("forward", "__call__", *names)):
            self.test(f"{{0}}.{name} is {{1}}", kind, getattr(kind, name))


@functools.lru_cache(maxsize=64)  # equal modules, such as the layers of a stack, share the code
def _code(names: tuple[str, ...], tests: tuple[str, ...]) -> CodeType:
    """The code of a function that takes these names, by default the recorded values."""
    condition = "\n            and ".join(tests)
    source = (
        f"def holds({', '.join(names)}):\n    try:\n        return (\n            {condition}\n"
        "        )\n    except (AttributeError, KeyError):\n        return False\n"
    )
    made: dict[str, Any] = {}
    exec(compile(source, "<facts about modules>", "exec"), made)
    code: CodeType = made["holds"].__code__
    return code
