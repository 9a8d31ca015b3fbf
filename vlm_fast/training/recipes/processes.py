"""Rank and world size as the launcher states them, and messages from rank 0 alone."""

from __future__ import annotations

import os
import sys


def is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def say(message: str) -> None:
    if is_main():
        print(f"recipe: {message}", file=sys.stderr, flush=True)
