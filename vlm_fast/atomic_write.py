"""Write a file completely or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of a file by ``text``, in UTF-8.

    Whoever reads the file meanwhile, or after a crash, finds the old content or the new one. The
    text is first written to a file in the same folder, which is then renamed.

    Raises:
        OSError: the file cannot be written; its old content is kept.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
