"""How a library, or a known pattern of plain PyTorch, computes an op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Unavailable(Exception):
    """Raised, or returned, with the reason why a provider cannot compute a call on this machine."""

    @classmethod
    def because(cls, error: BaseException) -> Unavailable:
        """Make one of another error: its type and the first line of its message."""
        if isinstance(error, cls):
            return error
        line = next(iter(str(error).strip().splitlines()), "")
        return cls(f"{type(error).__name__}: {line[:200]}".rstrip(": "))


@dataclass(frozen=True)
class Peer:
    """A library's function for an op.

    ``make(*args, **options)`` returns a function of the same arguments, or raises `Unavailable`.
    Masks and indices that a caller would make once for all layers are made in ``make``, so they are
    not timed.

    Attributes:
        name: of the provider in tables.
        op: name of the op.
        make: see above.
        package: that must be installed, if any.
        cuda_only: whether it runs on GPUs only.
        same: False for a provider that computes another function, as its name says.
        compiles: whether its first call takes seconds.
    """

    name: str
    op: str
    make: Callable[..., Callable[..., Any]]
    package: str | None = None
    cuda_only: bool = False
    same: bool = True
    compiles: bool = False
