"""Patching by class swap: the module stays, its class becomes a subclass made for it.

Parameters, hooks, names and checkpoints stay the same objects. The subclass carries the names of
its base, which device placement and output capture compare; ``repr`` shows the patch.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, ClassVar, NamedTuple

from torch import nn


class Patch(NamedTuple):
    """What a swapped class was made from; hashable, picklable."""

    base: type[nn.Module]
    mixin: type[Swapped]
    recipe: Any


class Swapped:
    """Mixin of every class that was made for a module."""

    patch: ClassVar[Patch]

    def prepare(self) -> None:
        """What becoming this class brings with it; values, names and objects must stay."""

    def _get_name(self) -> str:
        return f"{self.patch.base.__name__}[vlm_fast]"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made at run time cannot be found by name: name what it is made from instead.
        reduced: tuple[Any, ...] = super().__reduce_ex__(max(2, int(protocol)))  # type: ignore
        return (_rebuild, tuple(self.patch), *reduced[2:])


class Patched(Swapped):
    """Mixin of every class that computes the same on the fast ops."""

    alone: ClassVar[bool] = False  # whether its base's forward takes what its own is given

    def why_not(self) -> str | None:
        """Why the next call would run as plain PyTorch, or None."""
        return None

    def unpatched(self) -> nn.Module | None:
        """A copy that computes as its base does on what this is given; None if none can, alone."""
        if not self.alone:
            return None
        plain: Any = copy.deepcopy(self)
        patched = [module for module in plain.modules() if isinstance(module, Patched)]
        for module in patched:
            swap_back(module)
        return plain


@functools.cache
def patched_class(base: type[nn.Module], mixin: type[Swapped], recipe: Any) -> type[nn.Module]:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    patch = Patch(base, mixin, recipe)
    return type(base.__name__, (mixin, base), {**names, "__doc__": base.__doc__, "patch": patch})


def is_class(module: nn.Module, family: str, *names: str) -> bool:
    """Whether this is one of transformers' classes ``names`` of a model ``family``."""
    kind = type(module)
    home = f"transformers.models.{family}."
    return kind.__name__ in names and f"{kind.__module__}.".startswith(home)


def swap(module: nn.Module, mixin: type[Swapped], recipe: Any) -> None:
    module.__class__ = patched_class(type(module), mixin, recipe)  # type: ignore[arg-type]
    module.prepare()  # type: ignore[operator]


def swap_back(module: Any) -> None:
    module.__class__ = type(module).patch.base


def _rebuild(base: type[nn.Module], mixin: type[Swapped], recipe: Any) -> nn.Module:
    cls = patched_class(base, mixin, recipe)  # type: ignore[arg-type]
    return cls.__new__(cls)
