"""Does a class still run the code that its own module defines?

A kernel restates what a class computes. That holds for the code that was read, so a forward that
somebody replaced at class level is a reason to call the class instead.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import nn

from vlm_fast.modules.parameter_access.code_fingerprints import why_not_known_code
from vlm_fast.ops.registration import constant_while_compiling

# Functions of a class that were found to be as read. Only of classes that live as long as the
# process.
_AS_READ: dict[tuple[type, str], Any] = {}


@constant_while_compiling  # Dynamo cannot look into code objects
def why_not_original_code(kind: type, *methods: str) -> str | None:
    """None if these methods have the code that is restated; by default what a call runs.

    A function counts as replaced if its code comes from another file or another class, also behind
    ``functools.wraps``; decorators of transformers and of torch may stand around it. A function of
    transformers must be that of a release that was read, see `read_code`.
    """
    for name in methods or ("forward", "__call__"):
        function = getattr(kind, name, None)
        if function is None or _AS_READ.get((kind, name)) is function:
            continue
        reason = why_method_replaced(kind, name)
        reason = reason or why_not_known_code(_definer(kind, name), name, function)
        if reason is not None:
            return reason
        if kind.__module__.startswith(("torch.", "transformers.", "vlm_fast.")):
            _AS_READ[kind, name] = function
    return None


def why_method_replaced(kind: type, name: str) -> str | None:
    """None if a method is the one that its module defines, whether it was read or not."""
    if _is_original(_definer(kind, name), name, getattr(kind, name)):
        return None
    return f"{kind.__name__}.{name} has been replaced"


def _definer(kind: type, name: str) -> type:
    return next(base for base in kind.__mro__ if name in vars(base))


@constant_while_compiling
def why_not_original_class(kind: type) -> str | None:
    """The same of every method that a class has beyond those of every module."""
    return why_not_original_code(kind, "__call__", *(name for name, _ in own_methods(kind)))


def own_methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Names and functions of the methods that a class has beyond those of every module."""
    for base in kind.__mro__:
        if base is nn.Module or base.__module__ == "transformers.modeling_utils":
            return
        for name, value in vars(base).items():
            if (name.startswith("__") and name != "__call__") or name == "extra_repr":
                continue
            if isinstance(value, FunctionType) and getattr(kind, name, None) is value:
                yield name, value


def names_used_by(function: Any) -> frozenset[str]:
    """The globals and attributes that a function names, also behind its decorators."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return frozenset() if code is None else frozenset(code.co_names)


def class_before_patch(module: nn.Module) -> type[nn.Module]:
    """The class of a module as somebody wrote it: of a patched module, that before the patch."""
    return _written(type(module))


@constant_while_compiling
def _written(kind: type[nn.Module]) -> type[nn.Module]:
    if kind.__name__.startswith("FSDP"):  # FSDP2 puts a class of its own before that of a unit
        kind = next(k for k in kind.__mro__ if not _is_of_fsdp(k))
    patch = kind.__dict__.get("patch_spec")
    written: type[nn.Module] = getattr(patch, "base", kind)
    return written


def _is_of_fsdp(kind: type) -> bool:
    return any(base.__name__ == "FSDPModule" for base in kind.__mro__)


def defining_package(kind: type) -> str:
    """Where classes that belong together are defined: a model's package, or a module."""
    parts = kind.__module__.split(".")
    return ".".join(parts[:3] if parts[:2] == ["transformers", "models"] else parts)


def _is_original(definer: type, name: str, function: Any) -> bool:
    """Whether a function was written in the body of the class that it was found in."""
    if definer is nn.Module:  # whose forward is a function beside it
        return bool(function.__module__ == definer.__module__)
    while hasattr(function, "__wrapped__"):
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(_folders_of_decorators()):
            return False
        function = function.__wrapped__
    code = getattr(function, "__code__", None)
    if code is None:
        return False
    module = sys.modules.get(definer.__module__)
    return (
        function.__module__ == definer.__module__
        and function.__qualname__ == f"{definer.__qualname__}.{name}"
        and code.co_name == name
        and code.co_filename == getattr(module, "__file__", code.co_filename)
    )


def _folders_of_decorators() -> tuple[str, ...]:
    """Where the code of decorators lies that change no result."""
    import torch.utils._contextlib as gradient_modes

    folders = [str(gradient_modes.__file__)]
    transformers = sys.modules.get("transformers")
    if transformers is not None and transformers.__file__ is not None:
        home_of_all = Path(transformers.__file__).parent
        # Since 5.24 a layer's base class wraps checkpointing around the forward of each subclass.
        folders += [f"{home_of_all}/utils/", f"{home_of_all}/modeling_layers.py"]
    return tuple(folders)
