"""Do an input and the weights that an op would read have the same dtype?

Modules called one after the other may have different dtypes: torch promotes some combinations and
rejects others. An op computes in one dtype. Where dtypes differ, the modules are called instead.
Under autocast all of them compute in its dtype.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vlm_fast.ops.declaration import FLOATS
from vlm_fast.ops.transforms import constant_while_compiling

# For each module whose last input had another dtype than its weight, the dtype of that input.
# It is made when an input first differs, so that the usual case is cheap to tell.
_last_input: WeakKeyDictionary[nn.Module, torch.dtype] | None = None


def why_dtypes_differ(x: Any, **modules: Any) -> str | None:
    """Why the weights of these modules and ``x`` do not have one dtype, or None if they do.

    Args:
        x: the input of the first module. None stands for the input of the last call; if there was
            none, for an input with the dtype of the first weight.
        modules: linears or norms by name, in calling order.
    """
    first = next(iter(modules.values()))
    dtype = first.weight.dtype
    if x is not None and not isinstance(x, Tensor):  # the op raises the error
        return None
    if _autocasts(first.weight if x is None else x):
        return None
    if x is None:
        given = dtype if _last_input is None else _last_input.get(first, dtype)
    else:
        given = x.dtype
        if not torch.compiler.is_compiling():
            _record_input(first, given, dtype)
    for name, module in modules.items():
        if module.weight.dtype is not given:
            return f"{name} is {module.weight.dtype}, its input {given}"
    return None


def is_common_dtype(x: Any, dtype: torch.dtype | None) -> bool:
    """Whether `why_dtypes_differ` surely gives None for ``x`` and weights that all have ``dtype``.

    ``dtype`` is None if the weights have several. This is only a quick test for the usual case.
    """
    return dtype is not None and getattr(x, "dtype", None) is dtype and not has_other_input()


@constant_while_compiling
def has_other_input() -> bool:
    """Whether the last input of any module had another dtype than its weight."""
    return bool(_last_input)


def _autocasts(x: Tensor) -> bool:
    # Autocast does not cast float64.
    return x.dtype in FLOATS and torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu")


def _record_input(module: nn.Module, given: torch.dtype, dtype: torch.dtype) -> None:
    global _last_input
    if given is not dtype:
        if _last_input is None:
            _last_input = WeakKeyDictionary()
        _last_input[module] = given
    elif _last_input is not None:
        _last_input.pop(module, None)
