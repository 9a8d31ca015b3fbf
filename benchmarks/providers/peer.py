"""A library's, or a pattern's, way to compute an op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Unavailable(Exception):
    """Why a provider cannot compute this call on this machine."""

    @classmethod
    def because(cls, error: BaseException) -> Unavailable:
        """The first line of another error, with its kind."""
        if isinstance(error, cls):
            return error
        line = next(iter(str(error).strip().splitlines()), "")
        return cls(f"{type(error).__name__}: {line[:200]}".rstrip(": "))


@dataclass(frozen=True)
class Peer:
    """``make(*args, **options)`` gives a function of the same arguments, or raises.

    Masks and indices that a caller would make once for all layers are made in ``make``, and so are
    not timed.
    """

    name: str
    op: str
    make: Callable[..., Callable[..., Any]]
    package: str | None = None
    cuda_only: bool = False
