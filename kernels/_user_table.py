"""Which config wins where on this machine: a table that its user has measured with vlm-fast tune.

A file of anybody's cache is not to be trusted as a shipped one is: the directory must be private,
the content is checked entry by entry, and what is wrong is as if it were not there. A table holds
numbers and names only, and is never executed.

Environment: ``VLM_FAST_CACHE_DIR`` or ``XDG_CACHE_HOME`` say where the directory lies;
``VLM_FAST_USER_TABLE=0`` ignores user tables, ``=1`` uses them in a process group too, where they
are otherwise ignored: another machine may hold another table, and ranks must choose alike.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ._triton import AVAILABLE, triton

SCHEMA = 1
KEYS = {"schema", "gpu", "versions", "sources", "kernels"}
MOST_BYTES = 2**20  # a table of every kernel has a few thousand
SWITCH = "VLM_FAST_USER_TABLE"
ABSENT = "none was measured: vlm-fast tune"

Entries = dict[str, dict[str, dict[str, int]]]  # kernel -> dtype -> size -> index of the config


@dataclass(frozen=True)
class Found:
    """What a user table says, and, where that is nothing, why.

    ``stale``: kernels whose source or list of configs is no longer the one that was measured.
    ``wrong``: whether the reason is worth a warning; that there is no table is not.
    """

    kernels: Entries = field(default_factory=dict)
    reason: str = ""
    wrong: bool = False
    stale: tuple[str, ...] = ()
    digest: str = ""


def directory() -> Path:
    """Where user tables lie, whether it exists or not.

    Raises:
        ValueError: a variable does not name an absolute path, or there is no home directory.
    """
    for name, below in (("VLM_FAST_CACHE_DIR", ()), ("XDG_CACHE_HOME", ("vlm_fast",))):
        if value := os.environ.get(name):
            path = Path(value)
            if not path.is_absolute() or ".." in path.parts or path.parent == path:
                raise ValueError(
                    f"{name} must be the absolute path of a directory, without '..', got {value!r}"
                )
            return path.joinpath(*below, "configs")
    try:
        return Path.home() / ".cache" / "vlm_fast" / "configs"
    except RuntimeError as error:
        raise ValueError(f"there is no home directory: set VLM_FAST_CACHE_DIR ({error})") from None


def distrust(path: Path) -> str:
    """Why the directory, or the one it lies in, is not to be used; empty if it may be.

    Raises:
        FileNotFoundError: it does not exist.
    """
    if not hasattr(os, "geteuid"):
        return "whose a directory is cannot be told on this system"
    for place in (path.parent, path):
        try:
            found = os.lstat(place)
        except NotADirectoryError:
            raise FileNotFoundError(str(place)) from None
        if stat.S_ISLNK(found.st_mode):
            return f"{place} is a symbolic link; name the directory itself"
        if not stat.S_ISDIR(found.st_mode):
            return f"{place} is not a directory; remove it"
        if found.st_uid != os.geteuid():
            return f"{place} belongs to user {found.st_uid}, not to {os.geteuid()}"
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"{place} can be written by others; chmod 700 {place}"
    return ""


def find(name: str, sources: Mapping[str, Callable[[], str]]) -> Found:
    """The user's table of this name, as far as it holds for these kernels."""
    chosen = switch()
    if chosen is False:
        return Found(reason=f"{SWITCH} is off")
    try:
        path = directory() / name
        if reason := distrust(path.parent):
            return Found(reason=reason, wrong=True)
    except FileNotFoundError:
        return Found(reason=ABSENT)
    except (OSError, ValueError) as error:
        return Found(reason=str(error), wrong=True)
    if chosen is None and in_process_group() and path.exists():
        reason = f"{name} is not used in a process group, where ranks must choose alike; {SWITCH}=1"
        return Found(reason=f"{reason} uses it, if all machines hold the same", wrong=True)
    return load(path, sources)


def load(path: Path, sources: Mapping[str, Callable[[], str]]) -> Found:
    """What a table holds for these kernels; a file that is no table is moved out of the way."""
    try:
        text = _text_of(path)
    except FileNotFoundError:
        return Found(reason=ABSENT)
    except (OSError, ValueError) as error:
        return Found(reason=str(error), wrong=True)
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("not an object")
        if type(content["schema"]) is not int:
            raise ValueError("no schema")
        if content["schema"] != SCHEMA:
            return Found(reason=f"{path.name} has schema {content['schema']}, not {SCHEMA}")
        if content.keys() != KEYS:
            raise ValueError("other keys than a table's")
        measured, versions, kernels = content["sources"], content["versions"], content["kernels"]
        if not all(isinstance(part, dict) for part in (measured, versions, kernels)):
            raise ValueError("not a table's types")
    except (ValueError, KeyError, RecursionError) as error:
        with contextlib.suppress(OSError):
            os.replace(path, path.with_name(path.name + ".bad"))
        return Found(reason=f"{path.name} is no table, now {path.name}.bad ({error})", wrong=True)
    if versions.get("triton") != triton_version():
        reason = f"{path.name} was measured with Triton {versions.get('triton')}, "
        return Found(reason=f"{reason}this is {triton_version()}: vlm-fast tune", wrong=True)
    good, stale = valid_entries(kernels), []
    for kernel in list(good):
        if kernel not in sources or measured.get(kernel) != sources[kernel]():
            stale.append(kernel)
            del good[kernel]
    digest = hashlib.sha256(json.dumps(good, sort_keys=True).encode()).hexdigest()[:12]
    return Found(good, stale=tuple(stale), digest=digest)


def valid_entries(kernels: Any) -> Entries:
    """The entries that are what they should be; the others are left out."""
    good: Entries = {}
    for kernel, by_dtype in _items(kernels):
        for dtype, by_size in _items(by_dtype):
            for size, index in _items(by_size):
                if is_entry(size, index):
                    good.setdefault(kernel, {}).setdefault(dtype, {})[size] = index
    return good


def is_entry(size: str, index: Any) -> bool:
    """Whether a size in plain digits, and an index that a kernel's list of configs may have."""
    plain = size.isascii() and size.isdecimal() and len(size) < 20 and str(int(size)) == size
    return plain and type(index) is int and 0 <= index < 8


def switch() -> bool | None:
    """What ``VLM_FAST_USER_TABLE`` says; None where it is not set."""
    value = os.environ.get(SWITCH, "").strip().lower()
    if value in ("0", "false", "off", "no"):
        return False
    if value in ("1", "true", "on", "yes"):
        return True
    if value:
        warn(f"{SWITCH}={value!r} is not a switch (0 or 1); ignored")
    return None


def in_process_group() -> bool:
    """Whether other processes take part; torchrun says so before there is a group."""
    if os.environ.get("WORLD_SIZE", "1").strip() not in ("", "1"):
        return True
    group = torch.distributed
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1


def triton_version() -> str:
    return str(triton.__version__) if AVAILABLE else "absent"


@functools.cache
def warn(message: str) -> None:
    """Once a process."""
    warnings.warn(f"vlm_fast: {message}", stacklevel=2)


def _items(value: Any) -> Iterable[tuple[str, Any]]:
    return value.items() if isinstance(value, dict) else ()


def _text_of(path: Path) -> bytes:
    """A plain file's content: no link is followed, no pipe waited for, nothing endless read."""
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(file, "rb") as opened:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
            raise ValueError(f"{path.name} is not a file of at most {MOST_BYTES} bytes")
        return opened.read(MOST_BYTES)
