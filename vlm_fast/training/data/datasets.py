"""Datasets of images with conversations or captions, and a check of a whole dataset."""

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
CHECKED_AT_ONCE = 512  # records whose images are queued for threads


class _Item:
    """An item of a dataset. When it is pickled, its reference to the dataset is dropped."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "replacement": None}


@dataclass(frozen=True)
class Example(_Item):
    """A conversation about an image, or without one.

    Attributes:
        id: of the record.
        image: in RGB, or None.
        turns: of the conversation, with ``<image>`` in the text.
        index: number of the record in its file, for messages.
        file: path of the image, for messages.
        replacement: returns another example if a processor refuses this one; None if there must be
            none.
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
    """An image and its caption.

    Attributes:
        id: of the record.
        image: in RGB.
        text: the caption.
        index, file, replacement: see `Example`.
    """

    id: str
    image: Image
    text: str
    index: int | None = None
    file: str | None = None
    replacement: Callable[[RecordIssue], Caption] | None = field(
        default=None, repr=False, compare=False
    )


class ReplacedRecordWarning(UserWarning):
    """A record could not be used in training, and the next good record took its place."""


class UnusedKeyWarning(UserWarning):
    """Records have an unknown key; they are used without what it holds."""


class _ImageDataset(Dataset[Item], Generic[Item]):
    """Records with their images; ``on_bad`` decides what happens to missing or unreadable ones."""

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
        # Shared by all workers of a DataLoader, forked or spawned.
        self._replaced = torch.zeros(len(self._kept), dtype=torch.bool).share_memory_()
        self._warned = False

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def replaced(self) -> int:
        """Number of records that were replaced, because they were unreadable or refused."""
        return int(self._replaced.sum())

    def __getitem__(self, number: int) -> Item:
        """The item with this number; with ``on_bad="skip"`` the next one whose image can be read.

        Raises:
            BadRecord: its image cannot be read and ``on_bad`` is "stop", or no image can be read.
            IndexError: the number is out of range.
        """
        if not -len(self) <= number < len(self):
            raise IndexError(f"item {number} of {len(self)}")
        return self._first_readable(number % len(self), len(self))

    def _first_readable(self, place: int, count: int) -> Item:
        """The first readable item of ``count`` items from ``place`` on."""
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
        """The first readable item of ``count`` items after ``place``, for a refused item."""
        self._mark_replaced(place, bad := BadRecord(issue))
        if not count:
            raise bad
        return self._first_readable(place + 1, count)

    def _mark_replaced(self, place: int, bad: BadRecord) -> None:
        """Count a replaced record, and warn about the first one in this process."""
        self._replaced[place] = True
        if not self._warned:
            self._warned = True
            words = (
                "the next good record stands in for it, and for others without a further warning"
            )
            warnings.warn(f"{bad}; {words}", ReplacedRecordWarning, stacklevel=4)

    def record(self, number: int) -> Record:
        """The record of the item with this number."""
        return self.records[int(self._kept[number])]

    def _select(self) -> torch.Tensor:
        return torch.arange(len(self.records))

    def _item(self, record: Record) -> Item:
        raise NotImplementedError


class Conversations(_ImageDataset[Example]):
    """LLaVA's training JSON as a map-style dataset of `Example`.

    The file is a list of objects, or one object per line in ``.jsonl``: ``id``, optionally
    ``image`` (a path inside ``images``), and ``conversations``, a list of ``{"from", "value"}`` by
    "human" and "gpt" in turns. A question contains ``<image>`` exactly once if there is an image.

    The structure of all records is checked here; images are checked when they are read. `check`
    checks both in advance.

    Args:
        records: the file, or `Records` read from it.
        images: the folder of images.
        on_bad: "stop" raises `BadRecord`. "skip" leaves bad records out; if an image becomes
            unreadable later, or a `Collator` refuses an example, the next good record takes its
            place. It is the same one every time; each process warns once, and ``replaced`` counts
            them.
        background: colour behind transparent pixels: red, green and blue from 0 to 255, or a name
            that ``PIL.ImageColor`` knows, such as "#808080".
        progress: called with the bytes read so far and the size of the file.

    Attributes:
        issues: of records that were left out, and warnings, in the order of the file.

    Raises:
        BadRecord: a record is bad and ``on_bad`` is "stop".
        ValueError: no record is good, ``images`` is no folder, or the background is no colour.
        OSError: the file cannot be read.
    """

    def _item(self, record: Record) -> Example:
        return _example(record, self.images, self.background)


class Captions(_ImageDataset[Caption]):
    """The same file as images with captions: the first answer of each record.

    BLIP-2 trains on these in both stages. Records without an image are left out. Arguments,
    attributes and errors are those of `Conversations`.
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
    """The result of `check`.

    Attributes:
        total: number of records; None if the check stopped early.
        good: number of good records; None if the check stopped early.
        issues: in the order of the file.
    """

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
    """Read every record and decode every image, each file once.

    Args:
        records, images: see `Conversations`.
        on_bad: "stop" raises at the first bad record, checking the structure of all records before
            images. "skip" continues.
        threads: that decode images; None is Python's default.
        collate: such as a `Collator`, called on each good record alone, to find records that are
            too long or that its processor refuses. This decodes images a second time.
        background: see `Conversations`; used for ``collate``.
        progress: called with the number of checked records and the number of all records.

    Raises:
        BadRecord: see `Records`.
        ValueError: ``images`` is no folder.
        OSError: the file cannot be read.
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
    """Yield each record with the issue of its image or None; ``first`` caches issues by path."""
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
