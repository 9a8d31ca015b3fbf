"""Data sets of pictures with conversations or captions, and the check of a whole one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch.utils.data import Dataset

from vlm_fast.training.data.images import WHITE, Colour, load_image, parse_background
from vlm_fast.training.data.record_errors import BadRecord, OnBad, RecordIssue
from vlm_fast.training.data.records import UNKNOWN_KEY, Progress, Record, Records, Turn

if TYPE_CHECKING:
    from PIL.Image import Image

Item = TypeVar("Item", bound="_Item")
CHECKED_AT_ONCE = 512  # records whose pictures wait for a thread


class _Item:
    """What a data set gives. Sent to another process it goes without the data set behind it."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "instead": None}


@dataclass(frozen=True)
class Example(_Item):
    """A conversation about a picture in RGB, or about none; ``<image>`` stays in the text.

    Attributes:
        index, file: which record of the file it is, and where its picture lies, for messages.
        instead: gives the next example for one that a processor refuses; None where none may.
    """

    id: str
    image: Image | None
    turns: tuple[Turn, ...]
    index: int | None = None
    file: str | None = None
    replacement: Callable[[RecordIssue], Example] | None = field(
        default=None, repr=False, compare=False
    )


@dataclass(frozen=True)
class Caption(_Item):
    """A picture in RGB and what it shows. ``index``, ``file``, ``instead``: as of ``Example``."""

    id: str
    image: Image
    text: str
    index: int | None = None
    file: str | None = None
    replacement: Callable[[RecordIssue], Caption] | None = field(
        default=None, repr=False, compare=False
    )


class ReplacedRecordWarning(UserWarning):
    """A record's picture could not be used in training, and the next good one stood in for it."""


class UnusedKeyWarning(UserWarning):
    """Records have a key that is not known, and are used without what it holds."""


class _ImageDataset(Dataset[Item], Generic[Item]):
    """Records with their pictures. What is missing or unreadable is met as ``on_bad`` says."""

    def __init__(
        self,
        records: Path | str | Records,
        images: Path | str,
        *,
        on_bad: OnBad = "stop",
        background: str | tuple[int, int, int] = WHITE,
        progress: Progress | None = None,
    ) -> None:
        self.background = parse_background(background)
        if not isinstance(records, Records):
            records = Records(records, on_bad=on_bad, progress=progress)
        self.records, self.images, self.on_bad = records, Path(images), on_bad
        if not self.images.is_dir():
            raise ValueError(f"images is {str(images)!r}, expected a folder")
        self.issues = list(records.issues)
        for issue in self.issues:
            if issue.kind == UNKNOWN_KEY:
                warnings.warn(str(issue), UnusedKeyWarning, stacklevel=2)
        self._kept = self._select()
        if not len(self._kept):
            raise ValueError(f"{records.path} has no good record among {records.total}")
        # One for all workers of a DataLoader, whether forked or spawned.
        self._replaced = torch.zeros(len(self._kept), dtype=torch.bool).share_memory_()
        self._warned = False

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def replaced(self) -> int:
        """How many records another stood in for: unreadable meanwhile, or refused in a batch."""
        return int(self._replaced.sum())

    def __getitem__(self, number: int) -> Item:
        """The item of this number; with ``on_bad="skip"`` the next whose picture can be read.

        Raises:
            BadRecord: if its picture cannot be read and ``on_bad`` is ``"stop"``, or none can.
            IndexError: past the end.
        """
        if not -len(self) <= number < len(self):
            raise IndexError(f"item {number} of {len(self)}")
        return self._first_readable(number % len(self), len(self))

    def _first_readable(self, place: int, count: int) -> Item:
        """The first of so many items from this place on whose picture can be read."""
        for step in range(count):
            at = (place + step) % len(self)
            try:
                item = self._item(self.records[int(self._kept[at])])
            except BadRecord as bad:
                if self.on_bad == "stop":
                    raise
                last = bad
                self._mark_replaced(at, bad)
                continue
            if self.on_bad == "stop":
                return item
            return replace(item, replacement=partial(self._replacement_for, at, count - step - 1))  # type: ignore[type-var]
        raise last

    def _replacement_for(self, place: int, count: int, issue: RecordIssue) -> Item:
        """The first good one after this place, of so many, for an item that was refused."""
        self._mark_replaced(place, bad := BadRecord(issue))
        if not count:
            raise bad
        return self._first_readable(place + 1, count)

    def _mark_replaced(self, place: int, bad: BadRecord) -> None:
        self._replaced[place] = True
        if not self._warned:
            self._warned = True
            words = (
                "the next good record stands in for it, and for others without a further warning"
            )
            warnings.warn(f"{bad}; {words}", ReplacedRecordWarning, stacklevel=4)

    def record(self, number: int) -> Record:
        """The record that the item of this number is of."""
        return self.records[int(self._kept[number])]

    def _select(self) -> torch.Tensor:
        return torch.arange(len(self.records))

    def _item(self, record: Record) -> Item:
        raise NotImplementedError


class Conversations(_ImageDataset[Example]):
    """LLaVA's training JSON as a map-style data set of ``Example``.

    The file is a list of objects, or such an object a line in ``.jsonl``: ``id``, optionally
    ``image`` (a path within ``images``), and ``conversations``, a list of ``{"from", "value"}`` by
    "human" and "gpt" in turns. ``<image>`` stands once in a question if there is an image.

    The shape of all records is checked here, pictures as they are used; ``check`` looks at both
    beforehand.

    Args:
        records: the file, or ``Records`` already read from it.
        images: the folder that images lie in.
        on_bad: ``"stop"`` raises ``BadRecord``. ``"skip"`` leaves bad records out; where a picture
            becomes unreadable later, or a ``Collator`` refuses the example, the next good record
            stands in for it: with one warning a process, counted by ``replaced``, the same one
            every time.
        background: what shows where a picture is transparent: red, green and blue from 0 to 255, or
            a colour that ``PIL.ImageColor`` knows, such as ``"#808080"``.
        progress: told how many bytes of the file were read, of how many.

    Attributes:
        faults: what was wrong with records left out, and warnings, in the order of the file.

    Raises:
        BadRecord, ValueError, OSError: also if no good record is left, there is no such folder, or
            the background is no colour.
    """

    def _item(self, record: Record) -> Example:
        return _example(record, self.images, self.background)


class Captions(_ImageDataset[Caption]):
    """The same file as pictures with captions: the first answer of each record, and no question.

    What BLIP-2 learns from, in both stages. Records without an image are left out, as no fault.
    Arguments, attributes and errors are those of ``Conversations``.
    """

    def _select(self) -> torch.Tensor:
        return self.records.has_image.nonzero().flatten()

    def _item(self, record: Record) -> Caption:
        image, text = load_image(record, self.images, self.background), record.turns[1].text.strip()
        return Caption(record.id, image, text, record.index, record.image)


def _example(record: Record, images: Path, background: Colour) -> Example:
    image = None if record.image is None else load_image(record, images, background)
    return Example(record.id, image, record.turns, record.index, record.image)


@dataclass(frozen=True)
class CheckResult:
    """What the check of a data set found; numbers of records are None where it was stopped."""

    total: int | None
    good: int | None
    issues: list[RecordIssue]


def check(
    records: Path | str,
    images: Path | str,
    *,
    on_bad: OnBad = "skip",
    threads: int | None = None,
    collate: Callable[[Sequence[Example]], object] | None = None,
    background: str | tuple[int, int, int] = WHITE,
    progress: Progress | None = None,
) -> CheckResult:
    """Read every record and decode every picture, each file once.

    Args:
        records, images: as ``Conversations`` takes them.
        on_bad: ``"stop"`` raises at the first bad record; pictures are looked at after the shape of
            all records. ``"skip"`` goes on.
        threads: that decode; by default as many as Python thinks fit.
        collate: such as a ``Collator``, tried on each good record by itself: it refuses those that
            are too long or that its processor does not take. Pictures are decoded once more for it.
        background: as ``Conversations`` takes it, for ``collate``.
        progress: told how many records are done, of how many.

    Raises:
        BadRecord: as ``Records`` does.
        ValueError, OSError: if there is no such file or folder.
    """
    colour = parse_background(background)
    read, images = Records(records, on_bad=on_bad), Path(images)
    if not images.is_dir():
        raise ValueError(f"images is {str(images)!r}, expected a folder")
    issues = list(read.issues)
    good = len(read)
    first: dict[str, RecordIssue | None] = {}
    with ThreadPoolExecutor(threads) as pool:
        for done, (record, issue) in enumerate(_with_issues(read, images, pool.map, first), 1):
            if issue is None and collate is not None:
                issue = _issue_of(partial(_collated, collate, record, images, colour))
            if issue is not None:
                issue = replace(issue, index=record.index, id=record.id)
                if on_bad == "stop":
                    raise BadRecord(issue)
                issues.append(issue)
                good -= 1
            if progress is not None:
                progress(done, len(read))
    issues.sort(key=lambda issue: -1 if issue.index is None else issue.index)
    return CheckResult(read.total, good, issues)


def _with_issues(
    read: Records, images: Path, map_: Callable[..., Any], first: dict[str, RecordIssue | None]
) -> Iterator[tuple[Record, RecordIssue | None]]:
    """Each record, with the fault of its picture if that has one; ``first`` remembers by path."""
    numbers = iter(range(len(read)))
    while batch := [read[number] for number in islice(numbers, CHECKED_AT_ONCE)]:
        new = {r.image: r for r in batch if r.image is not None and r.image not in first}
        tried = [partial(load_image, record, images) for record in new.values()]
        first.update(zip(new, map_(_issue_of, tried), strict=True))
        for record in batch:
            yield record, None if record.image is None else first[record.image]


def _collated(
    collate: Callable[..., object], record: Record, images: Path, background: Colour
) -> None:
    collate([_example(record, images, background)])


def _issue_of(attempt: Callable[[], object]) -> RecordIssue | None:
    try:
        attempt()
    except BadRecord as bad:
        return bad.issue
    return None
