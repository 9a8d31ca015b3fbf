"""Does a class still have the code that its source file defines, and is that code known?

A fused op replaces the computation of a class. That is right for the code that its author has read.
If somebody has replaced the forward of the class since, the class must be called instead.
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
from vlm_fast.modules.parameter_access.sharded_parameters import is_fsdp_class
from vlm_fast.ops.transforms import constant_while_compiling

# Functions that were found to be original. Only for classes that live as long as the process.
_ORIGINAL: dict[tuple[type, str], Any] = {}


@constant_while_compiling  # Dynamo cannot look into code objects
def why_not_original_code(kind: type, *methods: str) -> str | None:
    """Why the code of these methods is not the known original, or None.

    Without ``methods`` those that a call runs are checked: ``forward`` and ``__call__``. A function
    counts as replaced if its code comes from another file or another class, even behind
    ``functools.wraps``; decorators of transformers and of torch are allowed. A function of
    transformers must also have a recorded fingerprint, see `code_fingerprints`.
    """
    for name in methods or ("forward", "__call__"):
        function = getattr(kind, name, None)
        if function is None or _ORIGINAL.get((kind, name)) is function:
            continue
        reason = why_method_replaced(kind, name)
        reason = reason or why_not_known_code(_defining_class(kind, name), name, function)
        if reason is not None:
            return reason
        if kind.__module__.startswith(("torch.", "transformers.", "vlm_fast.")):
            _ORIGINAL[kind, name] = function
    return None


def why_method_replaced(kind: type, name: str) -> str | None:
    """Why a method is not the one that the source file of its class defines, or None."""
    if _is_original(_defining_class(kind, name), name, getattr(kind, name)):
        return None
    return f"{kind.__name__}.{name} has been replaced"


def _defining_class(kind: type, name: str) -> type:
    return next(base for base in kind.__mro__ if name in vars(base))


@constant_while_compiling
def why_not_original_class(kind: type) -> str | None:
    """Why the code of any method that a class adds to nn.Module is not the original, or None."""
    return why_not_original_code(kind, "__call__", *(name for name, _ in own_methods(kind)))


def own_methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield name and function of each method that a class adds to nn.Module."""
    for base in kind.__mro__:
        if base is nn.Module or base.__module__ == "transformers.modeling_utils":
            return
        for name, value in vars(base).items():
            if (name.startswith("__") and name != "__call__") or name == "extra_repr":
                continue
            if isinstance(value, FunctionType) and getattr(kind, name, None) is value:
                yield name, value


def names_used_by(function: Any) -> frozenset[str]:
    """Names of the globals and attributes that a function uses; its decorators are skipped."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return frozenset() if code is None else frozenset(code.co_names)


def class_before_patch(module: nn.Module) -> type[nn.Module]:
    """The class of a module; for a patched module the class that it had before the patch."""
    return _class_before_patch(type(module))


@constant_while_compiling
def _class_before_patch(kind: type[nn.Module]) -> type[nn.Module]:
    if kind.__name__.startswith("FSDP"):  # FSDP2 puts its own class before that of the unit
        kind = next(k for k in kind.__mro__ if not is_fsdp_class(k))
    spec = kind.__dict__.get("patch_spec")
    original: type[nn.Module] = getattr(spec, "base", kind)
    return original


def defining_package(kind: type) -> str:
    """The package of a model in transformers, or the module, that defines a class."""
    parts = kind.__module__.split(".")
    return ".".join(parts[:3] if parts[:2] == ["transformers", "models"] else parts)


def _is_original(definer: type, name: str, function: Any) -> bool:
    """Whether a function was written in the body of the class that has it."""
    if definer is nn.Module:  # its forward is a function outside the class body
        return bool(function.__module__ == definer.__module__)
    while hasattr(function, "__wrapped__"):
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(_files_of_decorators()):
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


def _files_of_decorators() -> tuple[str, ...]:
    """Files and folders whose decorators do not change the result of a forward."""
    import torch.utils._contextlib as gradient_modes

    files = [str(gradient_modes.__file__)]
    transformers = sys.modules.get("transformers")
    if transformers is not None and transformers.__file__ is not None:
        package = Path(transformers.__file__).parent
        # Since 5.24 the base class of layers wraps checkpointing around each subclass's forward.
        files += [f"{package}/utils/", f"{package}/modeling_layers.py"]
    return tuple(files)
