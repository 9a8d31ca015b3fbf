"""Which settings, children and parameters of a module a `Guard` can record."""

from __future__ import annotations

from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import nn

from vlm_fast.modules.parameter_access.sharded_parameters import is_zero3_parameter

# Kinds of attributes that an answer may depend on: a norm's eps, a linear's out_features, ...
PLAIN_KINDS = (bool, int, float, str, type(None), FunctionType, BuiltinFunctionType)


def plain_attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """Names and values of the public attributes of a module that can be compared."""
    return [
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and isinstance(value, PLAIN_KINDS)
    ]


def with_containers(owner: nn.Module, modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules, and all modules between them and ``owner``."""
    found = dict.fromkeys(modules)
    seen = {owner}

    def leads_to_them(module: nn.Module) -> bool:
        leads = False
        for child in module._modules.values():
            if child is not None and (child in found or child not in seen):
                seen.add(child)
                if leads_to_them(child) or child in found:
                    found[child] = None
                    leads = True
        return leads

    leads_to_them(owner)
    return list(found)


def is_recordable(module: nn.Module) -> bool:
    """Whether the attributes and parameters of a module are where nn.Module keeps them."""
    kind = type(module)
    return (
        all(map(_is_recordable_parameter, module._parameters.values()))
        and kind.__getattr__ is nn.Module.__getattr__
        and kind.__getattribute__ is object.__getattribute__
        and not any(hasattr(kind, name) for name in (*module._parameters, *module._modules))
    )


def _is_recordable_parameter(parameter: Any) -> bool:
    if parameter is None:
        return True
    if type(parameter) is not nn.Parameter or parameter.is_meta:
        return False
    return not is_zero3_parameter(parameter) and not hasattr(parameter, "ds_status")
