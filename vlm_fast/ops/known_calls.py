"""Calls of an op that were checked once: one that equals them in all that is checked needs none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Served = tuple[dict[str, Any], bool]
MOST = 1024  # calls that are remembered for an op


class KnownCalls:
    """What ``check(arguments, options)`` answered, by what it looks at.

    Args:
        check: reads options, dtypes, devices, shapes, strides, and no elements. It returns what is
            remembered for the call, or None for a call that must be checked each time.
    """

    def __init__(self, check: Callable[[tuple[Any, ...], dict[str, Any]], Served | None]) -> None:
        self.check = check
        self._answers: dict[Any, Served | None] = {}

    def find(
        self, metadata: bytes, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Served | None:
        """The answer for a call with this description of its tensors."""
        key: Any = metadata
        if options:  # 1, 1.0 and True are equal, but not all of them need be accepted
            key = (metadata, *options.items(), *map(type, options.values()))
        try:
            return self._answers[key]
        except KeyError:
            pass
        except TypeError:  # an option that cannot be hashed
            return None
        if len(self._answers) >= MOST:
            self._answers.clear()
        found = self._answers[key] = self.check(arguments, options)
        return found
