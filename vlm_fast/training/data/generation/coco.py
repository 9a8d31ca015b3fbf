"""Read COCO's annotation JSON: captions and boxes of images."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from vlm_fast.training.data.record_errors import BadRecord, RecordIssue, count_by_kind, describe
from vlm_fast.training.data.records import why_unsafe_path

NUMBER = (int, float)
FAR = 1e9  # pixels; no image is larger
CROWD = "group of"  # prefix of the category of a box around several objects


@dataclass(frozen=True)
class Box:
    """A bounding box.

    Attributes:
        name: category of the object. A crowd, that is a box around several objects, has the prefix
            `CROWD`.
        x1, y1, x2, y2: left, top, right and bottom, as fractions of width and height.
    """

    name: str
    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Scene:
    """Captions and boxes of an image.

    Attributes:
        id: COCO's id of the image.
        image: file name inside the folder of images.
        captions: at least one.
        boxes: may be empty.
    """

    id: int
    image: str
    captions: tuple[str, ...]
    boxes: tuple[Box, ...]


def read_scenes(
    captions: Path, boxes: Path, *, issues: list[RecordIssue] | None = None
) -> list[Scene]:
    """The images that have a caption, in the order of the caption file.

    Boxes that are not inside their image are left out: without width or height, with numbers that
    are not finite, outside the image, or missing. So are images and categories that share an id
    with a different one. Boxes that extend beyond their image are clipped.

    Args:
        captions: COCO's ``captions_*.json``: ``images`` (``id``, ``file_name``, ``width``,
            ``height``) and ``annotations`` (``image_id``, ``caption``).
        boxes: COCO's ``instances_*.json``: ``annotations`` (``image_id``, ``category_id``, ``bbox``
            as left, top, width and height in pixels, ``iscrowd``) and ``categories`` (``id``,
            ``name``). Annotations of other images are ignored.
        issues: receives what is left out, and crowds. If it is None, a warning counts them.

    Raises:
        BadRecord: an entry has a wrong field; names the file, the entry and the field.
        OSError: a file cannot be read.
    """
    said, seen = _Annotations(captions), _Annotations(boxes)
    told: list[RecordIssue] = []
    images = _pictures(said, told)
    texts: dict[int, list[str]] = {}
    for entry in said.entries("annotations"):
        number = entry.of("image_id", (int,), "a whole number")
        text = entry.of("caption", (str,), "text").strip()
        if number not in images:
            entry.refuse("image_id", "the id of one of the images", describe(number))
        if not text:
            entry.refuse("caption", "text", describe(text))
        texts.setdefault(number, []).append(" ".join(text.split()))
    names = _unique(
        [
            (entry, entry.of("id", (int,), "a whole number"), entry.of("name", (str,), "a name"))
            for entry in seen.entries("categories")
        ],
        told,
    )
    found: dict[int, list[Box]] = {}
    for entry in seen.entries("annotations"):
        number = entry.of("image_id", (int,), "a whole number")
        image = images.get(number)
        if number not in texts or image is None:
            continue
        category = entry.of("category_id", (int,), "a whole number")
        if category not in names:
            entry.refuse("category_id", "the id of one of the categories", describe(category))
        box = _box(entry, names[category], image, told)
        if box is not None:
            found.setdefault(number, []).append(box)
    if issues is not None:
        issues += told
    elif told:
        kinds = ", ".join(f"{count} {kind}" for kind, count in count_by_kind(told).items())
        warnings.warn(f"{told[0]}; in all {kinds}", stacklevel=2)
    return [
        Scene(number, image[0], tuple(texts[number]), tuple(found.get(number, ())))
        for number, image in images.items()
        if image is not None and number in texts
    ]


Picture = tuple[str, float, float]


def _pictures(said: _Annotations, told: list[RecordIssue]) -> dict[int, Picture | None]:
    """File name, width and height by id; None if different images share the id."""
    found = []
    for entry in said.entries("images"):
        name = entry.of("file_name", (str,), "a file's name")
        if (why := why_unsafe_path(name)) is not None:
            entry.refuse("file_name", "a path within the images folder", why)
        size = [entry.of(side, NUMBER, "a positive number") for side in ("width", "height")]
        for side, length in zip(("width", "height"), size, strict=True):
            if not 0 < length < float("inf"):
                entry.refuse(side, "a positive number", describe(length))
        found.append((entry, entry.of("id", (int,), "a whole number"), (name, *size)))
    return _unique(found, told)


def _unique(entries: list[tuple[_Entry, int, Any]], told: list[RecordIssue]) -> dict[int, Any]:
    """Content by id; None if different contents share the id. Equal entries count as one."""
    found: dict[int, Any] = {}
    first: dict[int, tuple[_Entry, Any]] = {}
    for entry, number, content in entries:
        before, had = first.setdefault(number, (entry, content))
        found[number] = content if number not in found or content == found[number] else None
        if content != had:
            actual = f"{number}, that of {before.part}[{before.index}] too: neither is used"
            told.append(entry.issue("duplicate id", "id", "an id of its own", actual, number))
    return found


def _box(entry: _Entry, name: str | None, image: Picture, told: list[RecordIssue]) -> Box | None:
    """A box inside its image; or None, with the reason added to ``told``."""
    number, (_, width, height) = entry.content["image_id"], image
    corner = entry.content.get("bbox")
    wanted = "a box of some width and height within its picture"
    if corner is None or corner == []:
        told.append(entry.issue("no box", "bbox", wanted, "nothing", number))
        return None
    if not isinstance(corner, list) or len(corner) != 4 or {type(x) for x in corner} - {*NUMBER}:
        words = describe(str(corner) if isinstance(corner, list) else corner)
        entry.refuse("bbox", "four numbers: left, top, width, height", words)
    if name is None:
        told.append(entry.issue("no category", "category_id", "one category", "several", number))
        return None
    left, top, wide, high = corner
    edges = [0.0] * 4
    # comparisons with NaN are False
    if all(abs(edge) < FAR for edge in corner) and wide > 0 and high > 0:
        edges = [left / width, top / height, (left + wide) / width, (top + high) / height]
    x1, y1, x2, y2 = (round(min(max(edge, 0.0), 1.0), 3) for edge in edges)
    if not (x1 < x2 and y1 < y2):
        words = f"{describe(str(corner))} in a picture of {width} x {height}"
        told.append(entry.issue("no box", "bbox", wanted, words, number))
        return None
    if entry.content.get("iscrowd") in (None, 0):
        return Box(name, x1, y1, x2, y2)
    told.append(entry.issue("crowd", "iscrowd", "one object", f"a {CROWD} {name}", number))
    return Box(f"{CROWD} {name}", x1, y1, x2, y2)


@dataclass(frozen=True)
class _Entry:
    """An entry of a list in an annotation file, with its position for messages."""

    file: str
    part: str
    index: int
    content: Any

    def of(self, key: str, kinds: tuple[type, ...], expected: str) -> Any:
        if not isinstance(self.content, dict):
            self.refuse(None, "an object", describe(self.content))
        if key not in self.content:
            self.refuse(key, expected, "nothing")
        value = self.content[key]
        if not isinstance(value, kinds) or isinstance(value, bool):
            self.refuse(key, expected, describe(value))
        return value

    def refuse(self, key: str | None, expected: str, actual: str) -> NoReturn:
        raise BadRecord(self.issue("annotation", key, expected, actual))

    def issue(
        self, kind: str, key: str | None, expected: str, actual: str, image: int | None = None
    ) -> RecordIssue:
        field = f"{self.file}: {self.part}[{self.index}]" + (f".{key}" if key else "")
        return RecordIssue(
            kind, None, None if image is None else str(image), field, expected, actual
        )


class _Annotations:
    """A decoded annotation file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            issue = RecordIssue("not JSON", None, None, path.name, "JSON in UTF-8", str(error))
            raise BadRecord(issue) from None

    def entries(self, part: str) -> list[_Entry]:
        has_it = isinstance(self.content, dict) and isinstance(self.content.get(part), list)
        if not has_it:
            of = self.content.get(part) if isinstance(self.content, dict) else self.content
            issue = RecordIssue(
                "annotation", None, None, f"{self.path.name}: {part}", "a list", describe(of)
            )
            raise BadRecord(issue)
        return [_Entry(self.path.name, part, *pair) for pair in enumerate(self.content[part])]
