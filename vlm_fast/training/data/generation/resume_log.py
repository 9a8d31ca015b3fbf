"""A log of answers from which a run can resume after a crash at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

VERSION = 1
HEAD = "vlm_fast resume log"


class ResumeLog:
    """An append-only file with one line of JSON per task, flushed to disk before the next request.

    The first line describes the run; a log of a different run is not continued. An incomplete last
    line is dropped.

    Args:
        path: of the file. Only one process at a time may open it.
        log_header: describes the run, for example by the model and the prompts.

    Raises:
        ValueError: the file is no log, is of a different run, has a broken line before its last, or
            another process has it open.
    """

    def __init__(self, path: Path, log_header: dict[str, Any]) -> None:
        self.path, self.log_header = path, log_header
        self.entries: dict[str, dict[str, Any]] = {}
        self._lock = FileLock(f"{path}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another process is writing {path}") from None
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                self._read()
            except BaseException:
                os.close(self._file)
                raise
        except BaseException:
            self._lock.release()
            raise

    def add(self, task: str, **content: Any) -> None:
        """Append an entry; it is on disk when this returns."""
        entry = {"task": task, **content}
        self._write(entry)
        self.entries[task] = entry

    def close(self) -> None:
        """Close the file and release its lock."""
        os.close(self._file)
        self._lock.release()

    def __enter__(self) -> ResumeLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        head = {HEAD: VERSION, **self.log_header}
        if not lines:
            if not json.dumps(head).encode().startswith(content):
                raise ValueError(f"{self.path} is no resume log")
            os.ftruncate(self._file, 0)
            self._write(head)
            return
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if number > 1:
                    self.entries[entry["task"]] = entry
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.path} is no resume log in line {number}") from None
            if number == 1 and entry != head:
                raise ValueError(f"{self.path} is {_of(entry)}, expected one of {_words(head)}")
        os.ftruncate(self._file, len(whole))

    def _write(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)


def _of(entry: Any) -> str:
    known = isinstance(entry, dict) and HEAD in entry
    return f"a resume log of {_words(entry)}" if known else "no resume log"


def _words(head: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value!r}" for key, value in head.items() if key != HEAD)
