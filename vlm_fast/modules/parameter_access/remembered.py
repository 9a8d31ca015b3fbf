"""Remember an answer about modules until something changes that it depends on.

`remember` stores an answer on the module that it belongs to, with the test of a `Guard`. `recall`
returns the answer while the test holds. Otherwise the caller asks anew, which takes ten times as
long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from vlm_fast.modules.parameter_access.guard import Guard

_ASKED = "_asked_once"  # where `ask_once` stores that there is no reason
# An owner that changes before so many calls in a row is asked at every call from then on, because
# making a guard takes longer than asking.
MAX_CHANGES = 8
MAX_CALLS = 64  # that `remember_call` stores for a key


class Remembered:
    """An answer and the test of its guard; copies and pickles of its owner get None instead.

    Attributes:
        own: the ``__dict__`` of the module that the answer belongs to.
        holds: whether nothing has changed that the answer depends on.
        answer: the answer; None after a change.
        changes: how many answers in a row have been outdated at the next call.
    """

    __slots__ = ("answer", "changes", "holds", "own")

    def __init__(
        self, own: dict[str, Any], holds: Callable[[], bool], answer: Any, changes: int
    ) -> None:
        self.own, self.holds, self.answer, self.changes = own, holds, answer, changes

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy has other children


def recall(owner: Any, key: str) -> Any:
    """The answer that `remember` stored on ``owner``, if nothing has changed; otherwise None.

    While compiling the result is None: Dynamo makes guards of its own from the direct questions.
    A shallow copy of the owner, such as a replica of nn.DataParallel, has the same attributes in
    another ``__dict__``; the answer is not its own.
    """
    if torch.compiler.is_compiling():
        return None
    own = owner.__dict__
    found: Remembered | None = own.get(key)
    if found is None or found.own is not own:
        return None
    if found.holds():
        found.changes = 0
        return found.answer
    if found.answer is not None:  # it may hold the last reference to replaced parameters
        found.answer, found.holds = None, _changed
        found.changes += 1
    return None


def _changed() -> bool:
    return False


def stored(owner: Any, key: str) -> Any:
    """The answer that `remember` stored on ``owner``, without looking for changes; or None.

    None too while compiling.
    """
    if torch.compiler.is_compiling():
        return None
    own = owner.__dict__
    found: Remembered | None = own.get(key)
    return None if found is None or found.own is not own else found.answer


def remember(owner: Any, key: str, answer: Any, guard: Callable[[], Guard]) -> None:
    """Store ``answer`` on ``owner`` under ``key``.

    Nothing is stored while compiling, if the facts cannot be recorded, and for an owner that has
    changed before each of its last calls.

    Args:
        owner: the module that is called.
        key: the name of an attribute of the owner.
        answer: not None.
        guard: makes the guard over what the answer depends on.
    """
    if torch.compiler.is_compiling():
        return
    own = owner.__dict__  # a plain attribute: both are garbage-collected together
    before: Remembered | None = own.get(key)
    changes = 0 if before is None or before.own is not own else before.changes
    if changes < MAX_CHANGES:
        facts = guard()
        if facts.is_complete:
            own[key] = Remembered(own, facts.compiled(), answer, changes)


def ask_once(
    owner: Any,
    why_not: Callable[[], str | None],
    modules: Callable[[], Iterable[nn.Module]],
    key: str = _ASKED,
) -> str | None:
    """``why_not()``, asked anew only when something has changed since it gave None.

    Args:
        owner: the module that is called.
        why_not: gives a reason or None. It may depend on what a `Guard` records.
        modules: gives the modules inside the owner that it asks about.
        key: the name of an attribute of the owner; one for each question.
    """
    if recall(owner, key) is not None:
        return None
    reason = why_not()
    if reason is None:
        remember(owner, key, True, lambda: Guard(owner, modules()))
    return reason


def remember_call(
    owner: Any, key: str, which: Any, call: Any, modules: Callable[[], Iterable[nn.Module]]
) -> None:
    """Store one of several calls of ``owner``, which depend on the same facts.

    Args:
        owner: the module that is called.
        key: the name of an attribute of the owner, under which `recall` gives all calls.
        which: what a later call is looked up by, such as the side of its grid.
        call: not None.
        modules: gives the modules inside the owner that are read.
    """
    calls = recall(owner, key)
    if calls is None:
        calls = {}
        remember(owner, key, calls, lambda: Guard(owner, modules()))
    if len(calls) >= MAX_CALLS:
        calls.clear()
    calls[which] = call


def forget(owner: nn.Module) -> None:
    """Remove every answer that `remember` has stored on ``owner``."""
    own = owner.__dict__
    for key in [key for key, value in own.items() if type(value) is Remembered]:
        del own[key]
