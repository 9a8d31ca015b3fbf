"""`PatchedModule`: base of the mixins that compute what a class of transformers computes, faster.

An override of a mixin runs only while the method of the base class is the one that it was when the
class was made. If somebody replaces that method later, the new method is called instead.
"""

from __future__ import annotations

import copy
from types import FunctionType
from typing import Any, ClassVar

from torch import nn

from vlm_fast.modules.parameter_access.module_calls import (
    unwrap_checkpoint,
    why_no_extra_arguments,
)
from vlm_fast.patching.argument_names import ArgumentNames, match_arguments
from vlm_fast.patching.class_swap import SwappedClass, swap_back
from vlm_fast.patching.guarded_methods import (
    guarded_method,
    guarded_why_not,
    make_why_base_replaced,
    remembered_forward_of,
)


class PatchedModule(SwappedClass):
    """Base of the mixins of `vlm_fast.patch`: same results as the base class, on the fused ops.

    A mixin overrides methods of its base class, usually ``forward``. Under torch.fx's symbolic
    tracing the base's method runs. An override with named parameters is called by these names, even
    if the base class has other names or another order for them (see `argument_names`); it calls the
    base's method by `call_base`. The attributes that a mixin annotates, and the paths in
    ``required_attributes``, must exist when a module is patched.
    """

    # Whether forward takes the same arguments as the base's, so that a copy can run by itself.
    same_call_signature: ClassVar[bool] = False
    # Whether forward computes what all submodules do, so that none of them is patched as a chain.
    handles_children: ClassVar[bool] = True
    # Methods of the base class that the overrides mirror: patched only if their code is known.
    mirrored_methods: ClassVar[tuple[str, ...]] = ("forward",)
    # Dotted paths of attributes of submodules that the overrides read.
    required_attributes: ClassVar[tuple[str, ...]] = ()
    # ``(self, x)``: the forward of one argument, if nothing has changed that is remembered; else
    # NotImplemented. Only of the class that defines the forward, and before any other check.
    remembered_forward: ClassVar[Any] = None
    # For each override with named parameters, the names that the base class has for them.
    argument_names: ClassVar[dict[str, ArgumentNames]] = {}

    @classmethod
    def why_partly_patched(cls, module: nn.Module) -> str | None:
        """Why a part of what ``module`` does stays as it is although it is patched, or None."""
        return None

    def why_not(self) -> str | None:
        """Why the next call would run as plain PyTorch, or None."""
        return None

    def why_base_replaced(self) -> str | None:
        """Which method of the base class has been replaced since the patch, or None."""
        return None

    def call_base(self, method: str, /, **arguments: Any) -> Any:
        """Call a method of the base class with arguments by the names of this mixin's override."""
        names = self.argument_names[method]
        return getattr(self.patch_spec.base, method)(self, **names.to_base(arguments))

    def unpatched_copy(self) -> nn.Module | None:
        """A copy with the original classes; None if it takes other arguments than this module."""
        if not self.same_call_signature:
            return None
        plain: Any = copy.deepcopy(self)
        patched = [module for module in plain.modules() if isinstance(module, PatchedModule)]
        for module in patched:
            swap_back(module)
        return plain

    def __prepare_scriptable__(self) -> nn.Module:
        """For torch.jit.script: a module with the same parameters and the original class."""
        plain: Any = copy.copy(self)
        swap_back(plain)
        return plain

    @classmethod
    def class_attributes(cls, base: type[nn.Module]) -> dict[str, Any]:
        originals = {name: getattr(base, name) for name in overridden_methods(base, cls)}
        matched = {
            name: match_arguments(original, getattr(cls, name))
            for name, original in originals.items()
        }
        names = {name: m for name, m in matched.items() if isinstance(m, ArgumentNames)}
        remembered = remembered_forward_of(cls)
        methods = {
            name: guarded_method(
                base,
                cls,
                name,
                original,
                names.get(name),
                remembered if name == "forward" else None,
            )
            for name, original in originals.items()
        }
        return {
            "argument_names": names,
            **methods,
            "why_base_replaced": make_why_base_replaced(base, originals),
            "why_not": guarded_why_not(cls),
        }


def overridden_methods(base: type, mixin: type[PatchedModule]) -> list[str]:
    """Names of the methods of ``base`` that ``mixin`` overrides."""
    names = {name for kind in mixin.__mro__ if kind is not object for name in vars(kind)}
    return [
        name
        for name in sorted(names)
        if not name.startswith("_") and isinstance(getattr(base, name, None), FunctionType)
    ]


def why_not_compatible(module: nn.Module, mixin: type[PatchedModule]) -> str | None:
    """Why ``mixin`` does not fit the parameters and attributes of the class of a module, or None.

    Such a class is that of another release of transformers.
    """
    kind = type(module)
    for name in overridden_methods(kind, mixin):
        found = match_arguments(getattr(kind, name), getattr(mixin, name))
        if isinstance(found, str):
            return found
    for path in (*_annotated_attributes(mixin), *mixin.required_attributes):
        value: Any = module
        for part in path.split("."):
            if not hasattr(value, part):
                return f"{path} is missing"
            value = getattr(value, part)
    return None


def _annotated_attributes(mixin: type[PatchedModule]) -> list[str]:
    """The instance attributes that a mixin annotates."""
    return [
        name
        for kind in mixin.__mro__
        if kind not in (PatchedModule, SwappedClass, object)
        for name, annotation in vars(kind).get("__annotations__", {}).items()
        if not str(annotation).startswith("ClassVar")
    ]


def why_no_extra_arguments_for(layer: Any, mixin: type[PatchedModule]) -> str | None:
    """Why a patched model may pass ``layer`` only the arguments of its base class, or None.

    ``layer`` may be inside torch's wrapper for activation checkpointing.
    """
    inner: Any = unwrap_checkpoint(layer)
    if not isinstance(inner, mixin):
        return f"{type(inner).__name__} is not patched"
    reason: str | None = inner.why_base_replaced() or why_no_extra_arguments(inner)  # type: ignore[arg-type]
    return reason if inner is layer else reason or why_no_extra_arguments(layer)
