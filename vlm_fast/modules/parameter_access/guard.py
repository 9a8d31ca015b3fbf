"""Record facts about modules, and tell in a few microseconds whether all of them still hold.

Whether parameters may be read directly depends on classes and their code, hooks, children,
parameters and settings. A `Guard` records them and gives one function that compares them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from vlm_fast.ops.facts import Fact, compared, tensor_description

_GLOBAL_HOOKS = tuple(f"_global{kind}" for kind in HOOKS)


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
        self._facts: list[Fact] = []
        modules = with_containers(owner, modules)
        self.is_complete = all(map(is_recordable, (owner, *modules)))
        if not self.is_complete:
            return
        for name in _GLOBAL_HOOKS:
            self.record("false item", vars(_nn_module), name)
        self._record(owner)
        self.record("keys", owner._modules, value=tuple(owner._modules))
        for module in modules:
            self._record_call(module)
            self._record(module)
        for kind in {class_before_patch(module): None for module in (owner, *modules)}:
            self._record_code(kind, methods)

    def record(self, kind: str, thing: Any, key: Any = None, value: Any = None) -> None:
        """Record how ``thing`` compares with a key and a value; kind: see `vlm_fast.ops.facts`."""
        self._facts.append((kind, thing, key, value))

    def include(self, other: Any, key: str) -> None:
        """Record that the answer that is stored under ``key`` on another module is unchanged."""
        found = other.__dict__.get(key)
        if found is None or found.answer is None:
            self.is_complete = False
        else:
            self.record("call", found.holds, (), True)

    def record_modes(self, *modules: nn.Module) -> None:
        """Record whether these modules are in training mode."""
        for module in modules:
            self.record("item", module.__dict__, "training", module.training)

    def compiled(self) -> Callable[[], bool]:
        """A function without arguments: whether all facts still hold."""
        return compared(self._facts)

    def _record_call(self, module: nn.Module) -> None:
        """Record what a call of the module would do besides the forward of its class."""
        own = module.__dict__
        for kind in HOOKS:
            if own[kind]:
                self.record("item", own, kind, own[kind])
                self.record("values", own[kind], value=tuple(own[kind].values()))
            else:
                self.record("false item", own, kind)
        for name in ("forward", "_compiled_call_impl"):
            if name in own:
                self.record("item", own, name, own[name])
            else:
                self.record("no item", own, name)

    def _record(self, module: nn.Module) -> None:
        """Record the class, the children, the parameters and the settings of a module."""
        own = module.__dict__
        children, parameters = own["_modules"], own["_parameters"]
        self.record("type", module, value=type(module))
        if children:
            self.record("item", own, "_modules", children)
            self.record("values", children, value=tuple(children.values()))
        if parameters:
            self.record("item", own, "_parameters", parameters)
            self.record("values", parameters, value=tuple(parameters.values()))
        for name in (*children, *parameters):  # an attribute would hide it
            self.record("no item", own, name)
        for parameter in parameters.values():
            if parameter is not None:
                self._record_parameter(parameter)
        for name, value in plain_attributes(module):
            self.record("item", own, name, value)

    def _record_parameter(self, parameter: Tensor) -> None:
        """Record what may change without the parameter becoming another object.

        Code that swaps two tensors swaps their attributes too.
        """
        own = parameter.__dict__  # to which ZeRO-3 adds its state
        self.record("attribute", parameter, "__dict__", own)
        self.record("length", own, value=len(own))
        description = tensor_description(parameter)
        if description is None:
            self.is_complete = False
        self.record("tensor", parameter, value=description)

    def _record_code(self, kind: type[nn.Module], methods: bool) -> None:
        names = [name for name, _ in own_methods(kind)] if methods else []
        for name in dict.fromkeys(("forward", "__call__", *names)):
            self.record("attribute", kind, name, getattr(kind, name))
