"""COCO's annotation JSON: what is said of each picture, and what is where in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from vlm_fast.data.faults import BadRecord, Fault, shown
from vlm_fast.data.records import why_outside

NUMBER = (int, float)


@dataclass(frozen=True)
class Box:
    """An object: its category, and left, top, right and bottom as shares of width and height."""

    name: str
    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Scene:
    """All that is known of a picture. ``image`` is its file's name within the folder of images."""

    id: int
    image: str
    captions: tuple[str, ...]
    boxes: tuple[Box, ...]


def read_scenes(captions: Path, boxes: Path) -> list[Scene]:
    """The pictures that have a caption, in the order of the file of captions.

    Args:
        captions: COCO's ``captions_*.json``: ``images`` (``id``, ``file_name``, ``width``,
            ``height``) and ``annotations`` (``image_id``, ``caption``).
        boxes: COCO's ``instances_*.json``: ``annotations`` (``image_id``, ``category_id``, ``bbox``
            as left, top, width and height in pixels) and ``categories`` (``id``, ``name``).

    Raises:
        BadRecord: naming the file, the entry and the field that is not so.
        OSError: if a file cannot be read.
    """
    said, seen = _Annotations(captions), _Annotations(boxes)
    images: dict[int, tuple[str, float, float]] = {}
    for entry in said.entries("images"):
        name = entry.of("file_name", (str,), "a file's name")
        if (why := why_outside(name)) is not None:
            entry.refuse("file_name", "a path within the images folder", why)
        size = [entry.of(side, NUMBER, "a positive number") for side in ("width", "height")]
        for side, length in zip(("width", "height"), size, strict=True):
            if not 0 < length < float("inf"):
                entry.refuse(side, "a positive number", shown(length))
        images[entry.of("id", (int,), "a whole number")] = (name, *size)
    texts: dict[int, list[str]] = {}
    for entry in said.entries("annotations"):
        number = entry.of("image_id", (int,), "a whole number")
        text = entry.of("caption", (str,), "text").strip()
        if number not in images:
            entry.refuse("image_id", "the id of one of the images", shown(number))
        if not text:
            entry.refuse("caption", "text", shown(text))
        texts.setdefault(number, []).append(" ".join(text.split()))
    names = {
        entry.of("id", (int,), "a whole number"): entry.of("name", (str,), "a category's name")
        for entry in seen.entries("categories")
    }
    found: dict[int, list[Box]] = {}
    for entry in seen.entries("annotations"):
        number = entry.of("image_id", (int,), "a whole number")
        category = entry.of("category_id", (int,), "a whole number")
        if category not in names:
            entry.refuse("category_id", "the id of one of the categories", shown(category))
        corner = entry.of("bbox", (list,), "four numbers")
        if len(corner) != 4 or not all(type(edge) in NUMBER for edge in corner):
            entry.refuse("bbox", "four numbers: left, top, width, height", shown(str(corner)))
        if number in texts:  # instances may be of more pictures
            found.setdefault(number, []).append(_box(names[category], corner, images[number]))
    return [
        Scene(number, images[number][0], tuple(texts[number]), tuple(found.get(number, ())))
        for number in images
        if number in texts
    ]


def _box(name: str, corner: list[float], image: tuple[str, float, float]) -> Box:
    (left, top, wide, high), (_, width, height) = corner, image
    edges = (left / width, top / height, (left + wide) / width, (top + high) / height)
    # Annotators' boxes end up to a pixel outside.
    return Box(name, *(round(min(max(edge, 0.0), 1.0), 3) for edge in edges))


@dataclass(frozen=True)
class _Entry:
    """One object of a list, which knows where it is from."""

    file: str
    part: str
    index: int
    content: Any

    def of(self, key: str, kinds: tuple[type, ...], expected: str) -> Any:
        if not isinstance(self.content, dict):
            self.refuse(None, "an object", shown(self.content))
        if key not in self.content:
            self.refuse(key, expected, "nothing")
        value = self.content[key]
        if not isinstance(value, kinds) or isinstance(value, bool):
            self.refuse(key, expected, shown(value))
        return value

    def refuse(self, key: str | None, expected: str, came: str) -> NoReturn:
        field = f"{self.file}: {self.part}[{self.index}]" + (f".{key}" if key else "")
        raise BadRecord(Fault("annotation", None, None, field, expected, came))


class _Annotations:
    """One annotation file, decoded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            fault = Fault("not JSON", None, None, path.name, "JSON in UTF-8", str(error))
            raise BadRecord(fault) from None

    def entries(self, part: str) -> list[_Entry]:
        has_it = isinstance(self.content, dict) and isinstance(self.content.get(part), list)
        if not has_it:
            of = self.content.get(part) if isinstance(self.content, dict) else self.content
            fault = Fault(
                "annotation", None, None, f"{self.path.name}: {part}", "a list", shown(of)
            )
            raise BadRecord(fault)
        return [_Entry(self.path.name, part, *pair) for pair in enumerate(self.content[part])]
