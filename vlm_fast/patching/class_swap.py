"""Patching by class swap: the module stays, its class becomes a subclass made for it.

Parameters, hooks, names and checkpoints stay the same objects. The subclass carries the names of
its base, which device placement and output capture compare; ``repr`` shows the patch.
"""

from __future__ import annotations

import copy
import functools
from types import FunctionType
from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

from torch import nn
from torch.fx import Proxy

from vlm_fast.fallback import record_fallback
from vlm_fast.modules.parameter_access.linear import has_replaced_forward
from vlm_fast.modules.parameter_access.module_tree import (
    why_no_extra_arguments,
    unwrap_checkpoint,
)
from vlm_fast.patching.argument_names import ArgumentNames, match_arguments


class PatchSpec(NamedTuple):
    """What a swapped class was made from; hashable, picklable."""

    base: type[nn.Module]
    mixin: type[SwappedClass]
    settings: Any


class SwappedClass:
    """Mixin of every class that was made for a module."""

    patch_spec: ClassVar[PatchSpec]

    def after_swap(self) -> None:
        """What an instance does as it becomes one of this class, also as a copy without a state."""

    def _get_name(self) -> str:
        return f"{self.patch_spec.base.__name__}[vlm_fast]"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made at run time cannot be found by name: name what it is made from instead.
        reduced: tuple[Any, ...] = super().__reduce_ex__(max(2, int(protocol)))  # type: ignore
        return (_rebuild, tuple(self.patch_spec), *reduced[2:])


class PatchedModule(SwappedClass):
    """Mixin of every class that computes the same on the fast ops.

    Where a method that a mixin overrides is no longer the one that its base had when the class was
    made, the base's is called instead; so it is where a program is traced symbolically.

    An override with named parameters is called by those names, whatever position or name the base
    has for them (`parameters`), and calls the base by `call_base`. Attributes that a mixin
    annotates, and those of ``reads``, must be there at the patch.
    """

    same_call_signature: ClassVar[bool] = (
        False  # whether its base's forward takes what its own is given
    )
    handles_children: ClassVar[bool] = (
        True  # whether its chains are its own, and none is patched apart
    )
    # Methods of the base whose code is taken for granted: patched only while they are original.
    mirrored_methods: ClassVar[tuple[str, ...]] = ("forward",)
    # Attributes of children that are read, as paths.
    required_attributes: ClassVar[tuple[str, ...]] = ()
    # Of the overrides with named parameters, how the base calls those.
    argument_names: ClassVar[dict[str, ArgumentNames]] = {}

    @classmethod
    def why_partly_patched(cls, module: nn.Module) -> str | None:
        """Why a part of what a module does is not served, although the rest is, or None."""
        return None

    def why_not(self) -> str | None:
        """Why the next call would run as plain PyTorch, or None."""
        return None

    def why_base_replaced(self) -> str | None:
        """Which method of the base somebody replaced since the patch, or None."""
        return None

    def call_base(self, method: str, /, **given: Any) -> Any:
        """The base's own method, with arguments by the names of the override of this mixin."""
        return getattr(self.patch_spec.base, method)(
            self, **self.argument_names[method].back(given)
        )

    def unpatched_copy(self) -> nn.Module | None:
        """A copy that computes as its base does on what this is given; None if none can, alone."""
        if not self.same_call_signature:
            return None
        plain: Any = copy.deepcopy(self)
        patched = [module for module in plain.modules() if isinstance(module, PatchedModule)]
        for module in patched:
            swap_back(module)
        return plain

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles: the same parameters under the original class."""
        plain: Any = copy.copy(self)
        swap_back(plain)
        return plain


# Of a class that nobody uses any more nothing is kept.
_swapped_classes: WeakValueDictionary[Any, type[nn.Module]] = WeakValueDictionary()


def patched_class(
    base: type[nn.Module], mixin: type[SwappedClass], settings: Any
) -> type[nn.Module]:
    """The subclass of ``base`` that is served by ``mixin``; the same one while it is in use."""
    patch = PatchSpec(base, mixin, settings)
    known = _swapped_classes.get(patch)
    return known if known is not None else _swapped_classes.setdefault(patch, _make(patch))


def _make(patch: PatchSpec) -> type[nn.Module]:
    base, mixin, _ = patch
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    own: dict[str, Any] = {**names, "__doc__": base.__doc__, "patch_spec": patch}
    if issubclass(mixin, PatchedModule):
        served = {name: getattr(base, name) for name in _overridden(base, mixin)}
        found = {name: match_arguments(read, getattr(mixin, name)) for name, read in served.items()}
        own["argument_names"] = {
            name: names for name, names in found.items() if isinstance(names, ArgumentNames)
        }
        own |= {
            name: _guarded(base, mixin, name, read, own["argument_names"].get(name))
            for name, read in served.items()
        }
        own["why_base_replaced"] = _asking(base, served)
        own["why_not"] = _guarded_why_not(mixin)
    return type(base.__name__, (mixin, base), own)


def _overridden(base: type, mixin: type[PatchedModule]) -> list[str]:
    """The methods of the base that the mixin has in their place."""
    names = {name for kind in mixin.__mro__ if kind is not object for name in vars(kind)}
    return [
        name
        for name in sorted(names)
        if not name.startswith("_") and isinstance(getattr(base, name, None), FunctionType)
    ]


def why_not_compatible(module: nn.Module, mixin: type[PatchedModule]) -> str | None:
    """Why a module has not the parameters and attributes that a mixin knows, or None."""
    kind = type(module)
    for name in _overridden(kind, mixin):
        found = match_arguments(getattr(kind, name), getattr(mixin, name))
        if isinstance(found, str):
            return found
    for path in (*_annotated(mixin), *mixin.required_attributes):
        value: Any = module
        for part in path.split("."):
            if not hasattr(value, part):
                return f"{path} is missing"
            value = getattr(value, part)
    return None


def _annotated(mixin: type[PatchedModule]) -> list[str]:
    """Attributes that a mixin says it reads of its base."""
    return [
        name
        for kind in mixin.__mro__
        if kind not in (PatchedModule, SwappedClass, object)
        for name, what in vars(kind).get("__annotations__", {}).items()
        if not str(what).startswith("ClassVar")
    ]


def _guarded(base: Any, mixin: Any, name: str, read: Any, names: ArgumentNames | None) -> Any:
    """The mixin's method, as long as the base's is the one that was there before."""

    @functools.wraps(read)  # callers ask for its signature
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        current = getattr(base, name)
        if current is not read:
            record_fallback(base.__name__, _replaced(base, name))
            return current(self, *args, **kwargs)
        for value in (*args, *kwargs.values()):
            if isinstance(value, Proxy):  # torch.fx.symbolic_trace
                return current(self, *args, **kwargs)
        if names is None:
            return getattr(mixin, name)(self, *args, **kwargs)
        given = names.given(args, kwargs)
        if given is None:  # of which the base says what is wrong
            return current(self, *args, **kwargs)
        return getattr(mixin, name)(self, **given)

    return method


def _asking(base: Any, served: dict[str, Any]) -> Any:
    def why_base_replaced(self: Any) -> str | None:
        for name, read in served.items():
            if getattr(base, name) is not read:
                return _replaced(base, name)
        return None

    return why_base_replaced


def _guarded_why_not(mixin: Any) -> Any:
    @functools.wraps(mixin.why_not)
    def why_not(self: Any) -> str | None:
        return self.why_base_replaced() or mixin.why_not(self)

    return why_not


def _replaced(base: type, name: str) -> str:
    return f"{base.__name__}.{name} has been replaced since it was patched"


def why_no_extra_arguments_for(layer: Any, kind: type[PatchedModule]) -> str | None:
    """Why a layer must be called with the arguments of its base, or None.

    Also inside torch's wrapper for activation checkpointing.
    """
    inner: Any = unwrap_checkpoint(layer)
    if not isinstance(inner, kind):
        return f"{type(inner).__name__} is not patched"
    reason: str | None = inner.why_base_replaced() or why_no_extra_arguments(inner)  # type: ignore[arg-type]
    return reason if inner is layer else reason or why_no_extra_arguments(layer)


def is_class(module: nn.Module, family: str, *names: str) -> bool:
    """Whether this is one of transformers' classes ``names`` of a model ``family``."""
    kind = type(module)
    home = f"transformers.models.{family}."
    return kind.__name__ in names and f"{kind.__module__}.".startswith(home)


def swap(module: nn.Module, mixin: type[SwappedClass], settings: Any) -> None:
    drop_own_forward(module)
    module.__class__ = patched_class(type(module), mixin, settings)
    module.after_swap()  # type: ignore[operator]


def why_not_swapped_back(module: Any) -> str | None:
    """Why the class of a patched module cannot be given back, or None."""
    kind = type(module)
    if "patch_spec" in vars(kind):
        return None
    return (
        f"its class has become {kind.__name__} since it was patched, by sharding, a "
        "parametrization or the like, which the original class would lose"
    )


def swap_back(module: Any) -> None:
    """Give a module its original class.

    Raises:
        ValueError: somebody made another class of the patched one; nothing has been changed then.
    """
    reason = why_not_swapped_back(module)
    if reason is not None:
        raise ValueError(
            f"vlm_fast: {type(module).patch_spec.base.__name__} stays patched: {reason}"
        )
    drop_own_forward(module)
    module.__class__ = type(module).patch_spec.base
    module.__dict__.pop("_tree_snapshot", None)


def drop_own_forward(module: nn.Module) -> None:
    """Take away the attribute ``forward`` of a module, if it is the forward of its class.

    Collecting hidden states leaves one on each layer in transformers 4.54 to 5.1, and accelerate
    leaves one where it takes its hooks away. It would keep the forward of a class that was left.
    """
    if "forward" in module.__dict__ and not has_replaced_forward(module):
        del module.__dict__["forward"]


def _rebuild(base: type[nn.Module], mixin: type[SwappedClass], settings: Any) -> nn.Module:
    cls: Any = patched_class(base, mixin, settings)
    module = cls.__new__(cls)
    module.after_swap()
    return module
