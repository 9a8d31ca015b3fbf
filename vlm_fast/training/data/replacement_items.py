"""Collate items, replacing those that a processor refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch

from vlm_fast.training.data.record_errors import BadRecord, RecordIssue, describe

REFUSED = "refused by the processor"
WORDS = 300  # characters of the processor's message
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


class Item(Protocol):
    """An example or a caption; ``replacement`` returns another one if this may be replaced."""

    @property
    def id(self) -> str: ...
    @property
    def index(self) -> int | None: ...
    @property
    def file(self) -> str | None: ...
    @property
    def replacement(self) -> Callable[[RecordIssue], Any] | None: ...


Some = TypeVar("Some", bound=Item)
Batch = TypeVar("Batch")


def collate_or_replace(items: Sequence[Some], make: Callable[[Sequence[Some]], Batch]) -> Batch:
    """Call ``make(items)``; if it fails, try each item alone and replace those that are refused.

    Raises:
        BadRecord: an item is refused alone and has no replacement.
        Exception: from ``make``, if it accepts each item alone.
    """
    try:
        return make(items)
    except OUT_OF_MEMORY:
        raise
    except Exception:
        taken = [_accepted_or_replacement(item, make) for item in items]
        if all(now is before for now, before in zip(taken, items, strict=True)):
            raise
    return make(taken)


def _accepted_or_replacement(item: Some, make: Callable[[Sequence[Some]], object]) -> Some:
    """The item if it is accepted, or its first replacement that is."""
    while True:
        try:
            make([item])
            return item
        except OUT_OF_MEMORY:
            raise
        except BadRecord as bad:
            if bad.issue is None:
                raise
            issue, cause = replace(bad.issue, index=item.index, id=item.id), bad.__cause__
        except Exception as error:
            issue, cause = _issue_of(item, error), error
        if item.replacement is None:
            raise BadRecord(issue) from cause
        item = item.replacement(issue)


def _issue_of(item: Item, error: Exception) -> RecordIssue:
    words = f"{type(error).__name__}: {describe(str(error), WORDS)}"
    field = "conversations" if item.file is None else "image"
    actual = words if item.file is None else f"{describe(item.file)}: {words}"
    return RecordIssue(REFUSED, item.index, item.id, field, "a record that it takes", actual)
