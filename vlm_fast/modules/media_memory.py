"""Keys and values of images, remembered while the image features live.

A generated token attends to the same images as the one before. What was projected of them is kept
beside the module that projected it, until the features' memory is freed, they are written to, or
other ones come.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class _Entry(NamedTuple):
    storage: weakref.ref[Any]
    state: tuple[Any, ...]
    made: Any


_remembered: weakref.WeakKeyDictionary[nn.Module, _Entry] = weakref.WeakKeyDictionary()


def remembered(
    owner: nn.Module, source: Tensor, weights: Sequence[Tensor], make: Callable[[], T]
) -> T:
    """``make()``, or what it gave when the same memory, unwritten since, was last seen.

    One result an owner. Nothing is remembered where gradients are wanted, nor of stand-ins and
    subclasses. Of tensors made in inference mode writes leave no trace: taken as unwritten.
    """
    plain = type(source) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    if not plain or torch.is_grad_enabled() or owner.training:
        forget(owner)
        return make()
    storage = source.untyped_storage()
    state = (
        source.storage_offset(), source.shape, source.stride(), source.dtype, _version(source),
        *((id(w), w.data_ptr(), w.dtype, _version(w)) for w in weights),
    )  # fmt: skip
    entry = _remembered.get(owner)
    if entry is not None and entry.storage() is storage and entry.state == state:
        return entry.made
    made = make()
    here = weakref.ref(owner)

    def free(dead: weakref.ref[Any]) -> None:
        living = here()
        if living is not None and living in _remembered and _remembered[living].storage is dead:
            del _remembered[living]

    _remembered[owner] = _Entry(weakref.ref(storage, free), state, made)
    return made


def forget(owner: nn.Module) -> None:
    """Drop what is remembered beside ``owner``, as every step of training does.

    Writes through ``.data``, as some optimizers and averages of weights make, leave no trace.
    """
    if not torch.compiler.is_compiling():
        _remembered.pop(owner, None)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
