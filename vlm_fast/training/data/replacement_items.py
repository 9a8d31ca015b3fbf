"""A batch in spite of what a processor refuses: the item is named, and another may stand in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch

from vlm_fast.training.data.record_errors import BadRecord, Fault, shown

REFUSED = "refused by the processor"
WORDS = 300  # characters of what the processor says
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


class Item(Protocol):
    """An example or a caption; ``instead`` gives another for it, where one may stand in."""

    @property
    def id(self) -> str: ...
    @property
    def index(self) -> int | None: ...
    @property
    def file(self) -> str | None: ...
    @property
    def instead(self) -> Callable[[Fault], Any] | None: ...


Some = TypeVar("Some", bound=Item)
Batch = TypeVar("Batch")


def batch_of(items: Sequence[Some], make: Callable[[Sequence[Some]], Batch]) -> Batch:
    """``make(items)``. Where it fails, each item is tried alone, and those refused are replaced.

    Raises:
        BadRecord: naming an item that is refused alone, if nothing may stand in for it.
        Exception: what ``make`` raises, where each item alone is accepted.
    """
    try:
        return make(items)
    except OUT_OF_MEMORY:
        raise
    except Exception:
        taken = [_accepted(item, make) for item in items]
        if all(now is before for now, before in zip(taken, items, strict=True)):
            raise
    return make(taken)


def _accepted(item: Some, make: Callable[[Sequence[Some]], object]) -> Some:
    """The item, or the first that stands in for it and is not refused."""
    while True:
        try:
            make([item])
            return item
        except OUT_OF_MEMORY:
            raise
        except BadRecord as bad:
            if bad.fault is None:
                raise
            fault, cause = replace(bad.fault, index=item.index, id=item.id), bad.__cause__
        except Exception as error:
            fault, cause = _refusal(item, error), error
        if item.instead is None:
            raise BadRecord(fault) from cause
        item = item.instead(fault)


def _refusal(item: Item, error: Exception) -> Fault:
    words = f"{type(error).__name__}: {shown(str(error), WORDS)}"
    field = "conversations" if item.file is None else "image"
    came = words if item.file is None else f"{shown(item.file)}: {words}"
    return Fault(REFUSED, item.index, item.id, field, "a record that it takes", came)
