"""What can be wrong with a record, and the error that carries it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

OnBad = Literal["stop", "skip"]
# The record is used all the same.
WARNINGS = frozenset({"duplicate id", "unknown key"})
LONGEST = 80  # characters of what came that are shown


@dataclass(frozen=True)
class RecordIssue:
    """One thing that is wrong with a record, or with the whole file.

    Attributes:
        kind: what faults are counted by, such as ``"missing image"``.
        index: which record of the file, from 0; None is the whole file, or was not known.
        id: the record's own name, where it has one.
        field: where in the record, such as ``"conversations[1].from"``.
        expected, came: in words; what came is quoted, and cut to 80 characters.
    """

    kind: str
    index: int | None
    id: str | None
    field: str
    expected: str
    actual: str

    @property
    def record(self) -> str:
        if self.index is None:
            return "the file" if self.id is None else f"record {describe(self.id)}"
        return f"record {self.index}" + ("" if self.id is None else f" (id {describe(self.id)})")

    @property
    def what(self) -> str:
        return f"{self.kind}: expected {self.expected}, got {self.actual}"

    @property
    def is_warning(self) -> bool:
        return self.kind in WARNINGS

    def __str__(self) -> str:
        return f"{self.record}, {self.field}: {self.what}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class BadRecord(ValueError):
    """A record that cannot be used. ``fault`` says which, where and why.

    From a worker of a ``DataLoader`` it comes as PyTorch builds it there, from text alone: the
    message holds the same words, and ``fault`` is None.
    """

    def __init__(self, issue: RecordIssue | str) -> None:
        super().__init__(issue)
        self.issue = issue if isinstance(issue, RecordIssue) else None


def count_by_kind(issues: Iterable[RecordIssue]) -> dict[str, int]:
    """How many of each kind, the most frequent first."""
    return dict(Counter(issue.kind for issue in issues).most_common())


def describe(value: object, longest: int = LONGEST) -> str:
    """As JSON types are called, or quoted and cut: nothing in it can steer a terminal."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = "null" if value is None else ascii(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def check_on_bad(on_bad: str) -> OnBad:
    if on_bad not in get_args(OnBad):
        raise ValueError(f"on_bad is {on_bad!r}, expected 'stop' or 'skip'")
    return on_bad  # type: ignore[return-value]
