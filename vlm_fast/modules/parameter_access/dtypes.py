"""Have an input, and the weights that an op would read, one dtype?

Modules that are called one after the other may have several: a product with a float32 weight lifts
bfloat16, and where dtypes do not fit torch says so. An op computes in one. So where they differ the
modules are called. Autocast gives them one.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vlm_fast.ops.declaration import FLOATS

# Of each module whose last input had another dtype than its weight: the dtype of that input.
_last_input: WeakKeyDictionary[nn.Module, torch.dtype] = WeakKeyDictionary()


def why_dtypes_differ(x: Any, **modules: Any) -> str | None:
    """None if the weights of these modules have the dtype of ``x``, or autocast gives it to them.

    ``modules``: linears or norms by name, in the order in which they would be called. Without ``x``
    the dtype is that of the last call's input, or of the first weight if there was none.
    """
    first = next(iter(modules.values()))
    dtype = first.weight.dtype
    if x is not None and not isinstance(x, Tensor):  # the op says what it makes of it
        return None
    if _autocasts(first.weight if x is None else x):
        return None
    if x is None:
        given = _last_input.get(first, dtype)
    else:
        given = x.dtype
        if not torch.compiler.is_compiling():
            _remember(first, given, dtype)
    for name, module in modules.items():
        if module.weight.dtype is not given:
            return f"{name} is {module.weight.dtype}, its input {given}"
    return None


def _autocasts(x: Tensor) -> bool:
    # A float64 is left alone by autocast.
    return x.dtype in FLOATS and torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu")


def _remember(module: nn.Module, given: torch.dtype, dtype: torch.dtype) -> None:
    if given is not dtype:
        _last_input[module] = given
    elif _last_input:
        _last_input.pop(module, None)
