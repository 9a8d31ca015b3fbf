"""Issues of records, and the exception that carries one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

OnBad = Literal["stop", "skip"]
# Kinds of issues with which a record is still used.
WARNINGS = frozenset({"duplicate id", "unknown key"})
LONGEST = 80  # characters of a value that messages show


@dataclass(frozen=True)
class RecordIssue:
    """One problem of a record or of the whole file.

    Attributes:
        kind: such as "missing image"; issues are counted by it.
        index: number of the record in the file, from 0; None for the whole file, or if unknown.
        id: of the record, if it has one.
        field: where in the record, such as "conversations[1].from".
        expected: what is expected, in words.
        actual: what was found, quoted and cut to 80 characters.
    """

    kind: str
    index: int | None
    id: str | None
    field: str
    expected: str
    actual: str

    @property
    def record(self) -> str:
        """The record in words, for messages."""
        if self.index is None:
            return "the file" if self.id is None else f"record {describe(self.id)}"
        return f"record {self.index}" + ("" if self.id is None else f" (id {describe(self.id)})")

    @property
    def what(self) -> str:
        """Kind, expected and actual value in words."""
        return f"{self.kind}: expected {self.expected}, got {self.actual}"

    @property
    def is_warning(self) -> bool:
        """Whether the record is used despite the issue."""
        return self.kind in WARNINGS

    def __str__(self) -> str:
        return f"{self.record}, {self.field}: {self.what}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class BadRecord(ValueError):
    """A record that cannot be used.

    Attributes:
        issue: which record, where and why. It is None in an exception from a worker of a
            ``DataLoader``, which PyTorch rebuilds from its message; the message holds the same
            words.
    """

    def __init__(self, issue: RecordIssue | str) -> None:
        super().__init__(issue)
        self.issue = issue if isinstance(issue, RecordIssue) else None


def count_by_kind(issues: Iterable[RecordIssue]) -> dict[str, int]:
    """Number of issues of each kind, the most frequent first."""
    return dict(Counter(issue.kind for issue in issues).most_common())


def describe(value: object, longest: int = LONGEST) -> str:
    """A value in words: the type of an object or list, else quoted in ASCII and cut.

    No control character passes, so a message cannot manipulate a terminal.
    """
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = "null" if value is None else ascii(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def check_on_bad(on_bad: str) -> OnBad:
    """Return ``on_bad`` if it is "stop" or "skip".

    Raises:
        ValueError: it is neither.
    """
    if on_bad not in get_args(OnBad):
        raise ValueError(f"on_bad is {on_bad!r}, expected 'stop' or 'skip'")
    return on_bad  # type: ignore[return-value]
