"""Data sets of pictures with conversations or captions, and the check of a whole one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch.utils.data import Dataset

from vlm_fast.data.faults import BadRecord, Fault, OnBad, shown
from vlm_fast.data.records import Progress, Record, Records, Turn

if TYPE_CHECKING:
    from PIL.Image import Image

Item = TypeVar("Item")
CHECKED_AT_ONCE = 512  # records whose pictures wait for a thread


@dataclass(frozen=True)
class Example:
    """A conversation about a picture in RGB, or about none; ``<image>`` stays in the text."""

    id: str
    image: Image | None
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Caption:
    """A picture in RGB and what it shows."""

    id: str
    image: Image
    text: str


class UnreadablePicture(UserWarning):
    """A picture could not be read in training, and the next good record stood in for it."""


class _Pictured(Dataset[Item], Generic[Item]):
    """Records with their pictures. What is missing or unreadable is met as ``on_bad`` says."""

    def __init__(
        self,
        records: Path | str | Records,
        images: Path | str,
        *,
        on_bad: OnBad = "stop",
        progress: Progress | None = None,
    ) -> None:
        if not isinstance(records, Records):
            records = Records(records, on_bad=on_bad, progress=progress)
        self.records, self.images, self.on_bad = records, Path(images), on_bad
        if not self.images.is_dir():
            raise ValueError(f"images is {str(images)!r}, expected a folder")
        self.faults = list(records.faults)
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
        """How many records another stood in for, since their pictures became unreadable."""
        return int(self._replaced.sum())

    def __getitem__(self, number: int) -> Item:
        """The item of this number; with ``on_bad="skip"`` the next whose picture can be read.

        Raises:
            BadRecord: if its picture cannot be read and ``on_bad`` is ``"stop"``, or none can.
            IndexError: past the end.
        """
        if not -len(self) <= number < len(self):
            raise IndexError(f"item {number} of {len(self)}")
        number %= len(self)
        for step in range(len(self)):
            place = (number + step) % len(self)
            record = self.records[int(self._kept[place])]
            try:
                return self._item(record)
            except BadRecord as bad:
                if self.on_bad == "stop":
                    raise
                last = bad
                self._replaced[place] = True
                if not self._warned:
                    self._warned = True
                    warnings.warn(
                        f"{bad}; the next good record stands in for it, and for others without a "
                        "further warning",
                        UnreadablePicture,
                        stacklevel=2,
                    )
        raise last

    def _select(self) -> torch.Tensor:
        return torch.arange(len(self.records))

    def _item(self, record: Record) -> Item:
        raise NotImplementedError


class Conversations(_Pictured[Example]):
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
            becomes unreadable later, the next good record stands in for it: with one warning a
            process, counted by ``replaced``, the same one every time.
        progress: told how many bytes of the file were read, of how many.

    Attributes:
        faults: what was wrong with records left out, and warnings, in the order of the file.

    Raises:
        BadRecord, ValueError, OSError: also if no good record is left, or there is no such folder.
    """

    def _item(self, record: Record) -> Example:
        return _example(record, self.images)


class Captions(_Pictured[Caption]):
    """The same file as pictures with captions: the first answer of each record, and no question.

    What BLIP-2 learns from, in both stages. Records without an image are left out, as no fault.
    Arguments, attributes and errors are those of ``Conversations``.
    """

    def _select(self) -> torch.Tensor:
        return self.records.pictured.nonzero().flatten()

    def _item(self, record: Record) -> Caption:
        return Caption(record.id, picture(record, self.images), record.turns[1].text.strip())


def _example(record: Record, images: Path) -> Example:
    image = None if record.image is None else picture(record, images)
    return Example(record.id, image, record.turns)


def picture(record: Record, images: Path) -> Image:
    """The picture of a record that has one, decoded, in RGB.

    Raises:
        BadRecord: if there is no such file, or it cannot be decoded to its end.
        ModuleNotFoundError: without Pillow.
    """
    from PIL import Image

    assert record.image is not None
    path = images / record.image

    def bad(kind: str, expected: str, came: str) -> BadRecord:
        return BadRecord(Fault(kind, record.index, record.id, "image", expected, came))

    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise bad("missing image", f"a file in {images}", f"{shown(record.image)}, {what}")
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except MemoryError:
        raise
    # Decoders raise whatever a broken file leads them to: SyntaxError, struct.error, IndexError.
    except Exception as error:
        why = f"{shown(record.image)}: {type(error).__name__}: {shown(str(error))}"
        raise bad("unreadable image", "a picture that decodes to its end", why) from error


@dataclass(frozen=True)
class Checked:
    """What the check of a data set found; numbers of records are None where it was stopped."""

    total: int | None
    good: int | None
    faults: list[Fault]


def check(
    records: Path | str,
    images: Path | str,
    *,
    on_bad: OnBad = "skip",
    threads: int | None = None,
    collate: Callable[[Sequence[Example]], object] | None = None,
    progress: Progress | None = None,
) -> Checked:
    """Read every record and decode every picture, each file once.

    Args:
        records, images: as ``Conversations`` takes them.
        on_bad: ``"stop"`` raises at the first bad record; pictures are looked at after the shape of
            all records. ``"skip"`` goes on.
        threads: that decode; by default as many as Python thinks fit.
        collate: such as a ``Collator``, tried on each good record by itself: it refuses those that
            are too long. Pictures are decoded once more for it.
        progress: told how many records are done, of how many.

    Raises:
        BadRecord: as ``Records`` does.
        ValueError, OSError: if there is no such file or folder.
    """
    read, images = Records(records, on_bad=on_bad), Path(images)
    if not images.is_dir():
        raise ValueError(f"images is {str(images)!r}, expected a folder")
    faults = list(read.faults)
    good = len(read)
    first: dict[str, Fault | None] = {}
    with ThreadPoolExecutor(threads) as pool:
        for done, (record, fault) in enumerate(_looked_at(read, images, pool.map, first), 1):
            if fault is None and collate is not None:
                fault = _refusal(partial(_collated, collate, record, images))
            if fault is not None:
                fault = replace(fault, index=record.index, id=record.id)
                if on_bad == "stop":
                    raise BadRecord(fault)
                faults.append(fault)
                good -= 1
            if progress is not None:
                progress(done, len(read))
    faults.sort(key=lambda fault: -1 if fault.index is None else fault.index)
    return Checked(read.total, good, faults)


def _looked_at(
    read: Records, images: Path, map_: Callable[..., Any], first: dict[str, Fault | None]
) -> Iterator[tuple[Record, Fault | None]]:
    """Each record, with the fault of its picture if that has one; ``first`` remembers by path."""
    numbers = iter(range(len(read)))
    while batch := [read[number] for number in islice(numbers, CHECKED_AT_ONCE)]:
        new = {r.image: r for r in batch if r.image is not None and r.image not in first}
        tried = [partial(picture, record, images) for record in new.values()]
        first.update(zip(new, map_(_refusal, tried), strict=True))
        for record in batch:
            yield record, None if record.image is None else first[record.image]


def _collated(collate: Callable[..., object], record: Record, images: Path) -> None:
    collate([_example(record, images)])


def _refusal(attempt: Callable[[], object]) -> Fault | None:
    try:
        attempt()
    except BadRecord as bad:
        return bad.fault
    return None
