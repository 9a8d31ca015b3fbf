"""Checkpoints that a run can go on from: written to their end, by every process.

Trainer writes a checkpoint file by file, so one that was being written when the process was killed
looks much like any other. Here each that was finished has a list of its files, written last.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from vlm_fast.atomic_write import write_atomically

FILE_LIST = "files.json"
NAME = re.compile(r"checkpoint-(\d+)")
KEPT = 2  # complete checkpoints that are not deleted


def mark_complete(folder: Path) -> None:
    """Say that a checkpoint is whole: call it once every process has written its files."""
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != FILE_LIST
    }
    write_atomically(folder / FILE_LIST, json.dumps(files, indent=1))


def why_incomplete(folder: Path) -> str | None:
    """Why a checkpoint cannot be gone on from, or None."""
    try:
        files = json.loads((folder / FILE_LIST).read_text())
    except FileNotFoundError:
        return f"it has no {FILE_LIST}, which is written last"
    except ValueError:
        return f"its {FILE_LIST} is not JSON"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
    return None


def list_checkpoints(output: Path) -> list[tuple[int, Path, str | None]]:
    """Step, folder, and why it is not whole, of all checkpoints, the last first."""
    steps = [(NAME.fullmatch(path.name), path) for path in output.glob("checkpoint-*")]
    numbered = [(int(match.group(1)), path) for match, path in steps if match and path.is_dir()]
    return [(step, path, why_incomplete(path)) for step, path in sorted(numbered, reverse=True)]


def last_complete(output: Path) -> tuple[Path | None, list[str]]:
    """The last whole checkpoint, or None, and a line on each that was passed over for it."""
    passed: list[str] = []
    for _, path, why in list_checkpoints(output):
        if why is None:
            return path, passed
        passed.append(f"{path.name} is incomplete: {why}")
    return None, passed


def rotate(output: Path, kept: int = KEPT) -> None:
    """Delete whole checkpoints but the last ``kept``; one that is not whole counts for none."""
    for _, path, _ in [one for one in list_checkpoints(output) if one[2] is None][kept:]:
        shutil.rmtree(path)
