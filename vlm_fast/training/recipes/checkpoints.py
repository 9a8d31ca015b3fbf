"""Find, mark and delete checkpoints, telling complete ones from those that a crash left unfinished.

Trainer writes a checkpoint file by file, so a checkpoint that was being written during a crash
looks like any other. Therefore each complete checkpoint gets a list of its files and their sizes,
which is written last. Trainer's own ``save_total_limit`` would count unfinished checkpoints.
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
    """Write the list of files of a checkpoint, after every process has written its files."""
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != FILE_LIST
    }
    write_atomically(folder / FILE_LIST, json.dumps(files, indent=1))


def why_incomplete(folder: Path) -> str | None:
    """The reason why a checkpoint cannot be resumed from, or None."""
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
    """Step, folder and reason why it is incomplete of each checkpoint, newest first."""
    steps = [(NAME.fullmatch(path.name), path) for path in output.glob("checkpoint-*")]
    numbered = [(int(match.group(1)), path) for match, path in steps if match and path.is_dir()]
    return [(step, path, why_incomplete(path)) for step, path in sorted(numbered, reverse=True)]


def last_complete(output: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint or None, and a sentence about each newer one."""
    passed: list[str] = []
    for _, path, why in list_checkpoints(output):
        if why is None:
            return path, passed
        passed.append(f"{path.name} is incomplete: {why}")
    return None, passed


def rotate(output: Path, kept: int = KEPT) -> None:
    """Delete all but the newest ``kept`` complete checkpoints. Incomplete ones are not counted."""
    for _, path, _ in [one for one in list_checkpoints(output) if one[2] is None][kept:]:
        shutil.rmtree(path)
