"""Read LLaVA's conversation JSON, checking the structure of every record."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, NoReturn, cast

import torch

from vlm_fast.training.data.record_errors import (
    BadRecord,
    OnBad,
    RecordIssue,
    check_on_bad,
    describe,
)
from vlm_fast.training.data.record_keys import UNKNOWN_KEY, check_unsupported_content, unknown_keys

IMAGE_PLACEHOLDER = "<image>"
LINES = (".jsonl", ".ndjson")
ROLES = ("human", "gpt")
SPACE = " \t\n\r"
Role = Literal["human", "gpt"]
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: "human" or "gpt".
        text: with ``<image>`` in it.
    """

    role: Role
    text: str


@dataclass(frozen=True)
class Record:
    """One record with the right structure. Its image has not been read.

    Attributes:
        index: number of the record in the file, counting bad ones too.
        id: as text.
        image: path inside the folder of images, or None.
        turns: of the conversation.
    """

    index: int
    id: str
    image: str | None
    turns: tuple[Turn, ...]


def parse_record(content: Any, index: int) -> Record:
    """Make a record from decoded JSON.

    Args:
        content: decoded JSON.
        index: number of the record in its file.

    Raises:
        BadRecord: naming the field, the expected and the actual value.
    """
    name = _name(content)

    def refuse(kind: str, field: str, expected: str, actual: object) -> NoReturn:
        words = actual if isinstance(actual, _Description) else describe(actual)
        raise BadRecord(RecordIssue(kind, index, name, field, expected, words))

    def of(owner: dict[str, Any], key: str, kinds: tuple[type, ...], words: str, at: str) -> Any:
        if key not in owner:
            there = ", ".join(describe(k) for k in owner)
            refuse("missing key", at, words, _Description(f"keys {there}" if there else "no keys"))
        if not isinstance(owner[key], kinds) or isinstance(owner[key], bool):
            refuse("wrong type", at, words, owner[key])
        if isinstance(owner[key], str) and not _is_unicode(owner[key]):
            refuse("not Unicode", at, "text that UTF-8 can hold", owner[key])
        return owner[key]

    if not isinstance(content, dict):
        refuse("wrong type", "record", "an object", content)
    of(content, "id", (str, int), "a string or a whole number", "id")
    image = None
    if content.get("image") is not None:  # exporters write null for a missing image
        image = of(content, "image", (str,), "a path within the images folder", "image")
        if (why := why_unsafe_path(image)) is not None:
            refuse("path", "image", "a path within the images folder", _Description(why))
    said = of(content, "conversations", (list,), "a list of turns", "conversations")
    if not said:
        refuse("empty conversation", "conversations", "at least a question and an answer", said)
    turns = []
    for number, turn in enumerate(said):
        at = f"conversations[{number}]"
        if not isinstance(turn, dict):
            refuse("wrong type", at, "an object with from and value", turn)
        role = of(turn, "from", (str,), "'human' or 'gpt'", f"{at}.from")
        text = of(turn, "value", (str,), "a string", f"{at}.value")
        if role not in ROLES:
            refuse("unknown role", f"{at}.from", "'human' or 'gpt'", role)
        if role != ROLES[number % 2]:
            refuse("roles", f"{at}.from", f"{ROLES[number % 2]!r}: they alternate", role)
        if not text.strip():
            kind = "empty answer" if role == "gpt" else "empty question"
            refuse(kind, f"{at}.value", "text", text)
        if role == "gpt" and IMAGE_PLACEHOLDER in text:
            refuse(
                "image count",
                f"{at}.value",
                f"no {IMAGE_PLACEHOLDER} in an answer",
                text.count(IMAGE_PLACEHOLDER),
            )
        turns.append(Turn(cast(Role, role), text))
    check_unsupported_content(content, index, name)
    if len(turns) % 2:
        refuse("roles", "conversations", "an answer to the last question", _Description("none"))
    count, wanted = (
        sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns),
        int(image is not None),
    )
    if count != wanted:
        words = f"{wanted} {IMAGE_PLACEHOLDER}, with {'one image' if wanted else 'no image'}"
        refuse("image count", "conversations", words, count)
    return Record(index, str(content["id"]), image, tuple(turns))


class _Description(str):
    """A description of an actual value, as opposed to the value itself."""


def _name(content: Any) -> str | None:
    name = content.get("id") if isinstance(content, dict) else None
    return str(name) if isinstance(name, str | int) else None


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded. JSON can contain half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def why_unsafe_path(path: str) -> str | None:
    """The reason why a path could lead out of the folder of images on any system, or None.

    Only the text of the path is checked: links inside the folder were made by its owner.
    """
    parts = PureWindowsPath(path)  # splits at "/" as well as at backslashes
    if not path.strip() or "\0" in path:
        return f"{describe(path)}, no name of a file"
    if parts.anchor or parts.drive:
        return f"{describe(path)}, which is absolute"
    return f"{describe(path)}, which leads upwards" if ".." in parts.parts else None


class Records:
    """The good records of a file, decoded one at a time when they are used.

    The constructor decodes the whole file once to check the structure of every record. It keeps the
    byte position of each good record, 32 bytes per record, so that workers of a ``DataLoader``
    share no Python objects and spawned workers receive almost nothing. A JSON file has to fit into
    memory while it is read; of JSONL only a line. (An incremental parser such as ijson does not
    report byte positions.)

    Args:
        path: a JSON list of records, or with the suffix ``.jsonl`` or ``.ndjson`` one record per
            line.
        on_bad: "stop" raises at the first bad record, "skip" leaves it out.
        progress: called with the bytes read so far and the size of the file.

    Attributes:
        issues: of records that were left out, and warnings. An unknown key is reported once, at its
            first record.
        total: number of records, including bad ones.

    Raises:
        BadRecord: a record is bad and ``on_bad`` is "stop"; or, for any ``on_bad``, the file is no
            JSON or its top level is no list.
        OSError: the file cannot be read.
    """

    def __init__(
        self, path: Path | str, *, on_bad: OnBad = "stop", progress: Progress | None = None
    ) -> None:
        self.path, self.on_bad = Path(path), check_on_bad(on_bad)
        self.issues: list[RecordIssue] = []
        self.total = 0
        self._lines = self.path.suffix.lower() in LINES
        self._signature = _signature(os.stat(self.path))
        self._open()
        places = []
        first: dict[str, int] = {}
        unknown: dict[str, tuple[Record, Any, int]] = {}
        for content, start, end in self._lines_of() if self._lines else self._list_of():
            if progress is not None and self.total % 256 == 0:
                progress(end, self._signature[0])
            try:
                if isinstance(content, BadRecord):
                    raise content
                record = parse_record(content, self.total)
                places.append((self.total, start, end, record.image is not None))
                index = first.setdefault(record.id, self.total)
                if index != self.total:
                    wanted, actual = "an id of its own", f"that of record {index}"
                    issue = RecordIssue("duplicate id", self.total, record.id, "id", wanted, actual)
                    self.issues.append(issue)
                for key, value in unknown_keys(content):
                    begun, held, count = unknown.get(key, (record, value, 0))
                    unknown[key] = begun, held, count + 1
            except BadRecord as bad:
                if self.on_bad == "stop" or bad.issue is None:
                    raise
                self.issues.append(bad.issue)
            self.total += 1
        for key, (record, held, count) in unknown.items():
            actual = f"{describe(held)}, which is not used; {count} records have it"
            expected = "a key that is used, or known as metadata"
            issue = RecordIssue(UNKNOWN_KEY, record.index, record.id, key, expected, actual)
            self.issues.append(issue)
        self.issues.sort(key=lambda issue: -1 if issue.index is None else issue.index)
        if progress is not None:
            progress(self._signature[0], self._signature[0])
        self._places = torch.tensor(places, dtype=torch.int64).reshape(-1, 4)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Record:
        """The good record with this number, counted from 0 without the bad ones.

        Raises:
            RuntimeError: the file was changed in place. If it was replaced by another file, the old
                file is still read, except in processes that start later.
        """
        index, start, end, _ = self._places[number].tolist()
        try:
            return parse_record(json.loads(os.pread(self._file, end - start, start)), index)
        except ValueError:  # it was valid JSON before
            raise self._changed() from None

    @property
    def has_image(self) -> torch.Tensor:
        """Whether each good record has an image, ``(records,)`` bool."""
        return self._places[:, 3].bool()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        """Open the file; positioned reads are safe in forked workers that share the descriptor."""
        self._file = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        if _signature(os.fstat(self._file)) != self._signature:
            raise self._changed()

    def _changed(self) -> RuntimeError:
        return RuntimeError(f"{self.path} has changed since it was read: start again")

    def _lines_of(self) -> Iterator[tuple[Any, int, int]]:
        """Yield content and byte range of each line of JSONL."""
        start = 0
        with self.path.open("rb") as file:
            for line in file:
                end = start + len(line)
                begin = start + 3 * (start == 0 and line.startswith(b"\xef\xbb\xbf"))
                content = line[begin - start :].strip()
                if content:
                    try:
                        yield json.loads(content), begin, end
                    except (ValueError, RecursionError) as error:
                        yield BadRecord(_not_json(error, self.total)), begin, end
                start = end

    def _list_of(self) -> Iterator[tuple[Any, int, int]]:
        """Yield content and byte range of each element of a JSON list, in one pass."""
        content = self.path.read_bytes()
        bytes_before = 3 * content.startswith(b"\xef\xbb\xbf")
        try:
            text = content[bytes_before:].decode()
            del content
            decode, ascii_only = json.JSONDecoder().raw_decode, text.isascii()
            at = _after_space(text, 0)
            if text[at : at + 1] != "[":
                actual = describe(json.loads(text))
                raise BadRecord(RecordIssue("top level", None, None, "top level", "a list", actual))
            at = _after_space(text, at + 1)
            closed = text[at : at + 1] == "]"
            while not closed:
                value, end = decode(text, at)
                size = end - at if ascii_only else len(text[at:end].encode())
                yield value, at + bytes_before, at + bytes_before + size
                bytes_before += size - (end - at)
                at = _after_space(text, end)
                closed = text[at : at + 1] == "]"
                if not closed:
                    if text[at : at + 1] != ",":
                        raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
                    at = _after_space(text, at + 1)
            if (rest := _after_space(text, at + 1)) < len(text):
                raise json.JSONDecodeError("Extra data", text, rest)
        except BadRecord:
            raise
        except (ValueError, RecursionError) as error:
            raise BadRecord(_not_json(error, None)) from None


def _not_json(error: Exception, index: int | None) -> RecordIssue:
    where = "line" if index is not None else "top level"
    actual = (
        "lists or objects nested too deeply" if isinstance(error, RecursionError) else str(error)
    )
    return RecordIssue("not JSON", index, None, where, "JSON in UTF-8", actual)


def _after_space(text: str, at: int) -> int:
    while text[at : at + 1] and text[at] in SPACE:
        at += 1
    return at


def _signature(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_size, facts.st_mtime_ns
