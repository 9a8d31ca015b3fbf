"""Read the attributes of a module tree without the cost of ``nn.Module.__getattr__``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from vlm_fast.modules.parameter_access.module_tree import stored_tree
from vlm_fast.modules.parameter_access.recordable import plain_attributes


class ModuleView:
    """The children, parameters and settings of a module as plain attributes.

    It holds what a `Guard` records, and is valid as long as the guard holds. Every other attribute,
    such as ``training``, is read from the module. Modules without children and parameters, such as
    activations and dropouts, have no view.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.__dict__.update(plain_attributes(module))
        self.__dict__.update(module._parameters)
        for name, child in module._modules.items():
            inner = child is not None and (child._modules or child._parameters)
            self.__dict__[name] = ModuleView(child) if inner else child  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        """The children, as those of an nn.Sequential."""
        return iter([self.__dict__[name] for name in self._module._modules])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def view_of(root: Any) -> Any:
    """The `ModuleView` of a root that `why_not_direct_tree` has given None for; or the root itself.

    The latter while compiling, and if the answer is asked for at every call.
    """
    tree = stored_tree(root)
    return root if tree is None else tree.derived(ModuleView, root)
