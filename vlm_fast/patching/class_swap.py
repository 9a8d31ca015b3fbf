"""Replace the class of a module by a subclass made at run time; the module object stays.

Parameters, hooks, names and checkpoints stay the same objects. The subclass keeps the name of its
base, because device placement and output capture compare class names. ``repr`` shows the patch.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

from torch import nn

from vlm_fast.modules.parameter_access.module_calls import has_replaced_forward
from vlm_fast.modules.parameter_access.remembered import forget


class PatchSpec(NamedTuple):
    """The base, mixin and settings that a swapped class was made from; hashable and picklable."""

    base: type[nn.Module]
    mixin: type[SwappedClass]
    settings: Any


class SwappedClass:
    """Base of every mixin that a class made by `swapped_class` inherits from."""

    patch_spec: ClassVar[PatchSpec]

    @classmethod
    def class_attributes(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Further attributes of the class that is made from this mixin and ``base``."""
        return {}

    def after_swap(self) -> None:
        """Called when an instance gets this class, also for a copy that has no state yet."""

    def _get_name(self) -> str:
        return f"{self.patch_spec.base.__name__}[vlm_fast]"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle cannot import a class made at run time: it stores the PatchSpec instead.
        reduced: tuple[Any, ...] = super().__reduce_ex__(max(2, int(protocol)))  # type: ignore
        return (_rebuild, tuple(self.patch_spec), *reduced[2:])


# Weak: a class without instances is collected.
_swapped_classes: WeakValueDictionary[Any, type[nn.Module]] = WeakValueDictionary()


def swapped_class(
    base: type[nn.Module], mixin: type[SwappedClass], settings: Any
) -> type[nn.Module]:
    """The subclass of ``mixin`` and ``base``; the same class object for the same arguments."""
    spec = PatchSpec(base, mixin, settings)
    known = _swapped_classes.get(spec)
    return known if known is not None else _swapped_classes.setdefault(spec, _make_class(spec))


def _make_class(spec: PatchSpec) -> type[nn.Module]:
    base, mixin, _ = spec
    attributes = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "patch_spec": spec,
        **mixin.class_attributes(base),
    }
    return type(base.__name__, (mixin, base), attributes)


def swap(module: nn.Module, mixin: type[SwappedClass], settings: Any) -> None:
    """Give ``module`` the class that `swapped_class` makes of its class and ``mixin``."""
    drop_redundant_forward(module)
    module.__class__ = swapped_class(type(module), mixin, settings)
    module.after_swap()  # type: ignore[operator]


def why_not_swapped_back(module: Any) -> str | None:
    """Why a swapped module cannot get its original class back, or None."""
    kind = type(module)
    if "patch_spec" in vars(kind):
        return None
    return (
        f"its class has become {kind.__name__} since it was patched, by sharding, a "
        "parametrization or the like, which the original class would lose"
    )


def swap_back(module: Any) -> None:
    """Give a swapped module its original class back.

    Raises:
        ValueError: the swapped class has been subclassed, e.g. by sharding; nothing is changed.
    """
    reason = why_not_swapped_back(module)
    if reason is not None:
        name = type(module).patch_spec.base.__name__
        raise ValueError(f"vlm_fast: {name} stays patched: {reason}")
    drop_redundant_forward(module)
    module.__class__ = type(module).patch_spec.base
    forget(module)


def drop_redundant_forward(module: nn.Module) -> None:
    """Delete the instance attribute ``forward`` if it is the forward of the class.

    transformers 4.54 to 5.1 leaves one on each layer after collecting hidden states, and accelerate
    leaves one after removing its hooks. After a swap it would be the forward of the former class.
    """
    if "forward" in module.__dict__ and not has_replaced_forward(module):
        del module.__dict__["forward"]


def is_class(module: nn.Module, family: str, *names: str) -> bool:
    """Whether the class of ``module`` is ``transformers.models.<family>...<one of names>``."""
    kind = type(module)
    package = f"transformers.models.{family}."
    return kind.__name__ in names and f"{kind.__module__}.".startswith(package)


def _rebuild(base: type[nn.Module], mixin: type[SwappedClass], settings: Any) -> nn.Module:
    """For pickle and copy: an instance of the swapped class without a state."""
    cls: Any = swapped_class(base, mixin, settings)
    module = cls.__new__(cls)
    module.after_swap()
    return module
