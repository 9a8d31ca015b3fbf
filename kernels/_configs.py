"""Which config wins where: shipped JSON tables, read once, the same answer on every rank.

A table is ``configs/<sm>_<gpu>.json``::

    {"schema": 1, "kernels": {"<kernel>": {"<dtype>": {"<size>": <index of the config>}}}}

Written by the GPU run of the benchmark from measured times; no table means the default config.
What the user of a machine has measured there with ``vlm-fast tune`` comes first: `_user_table`.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import _user_table

PACKAGE = Path(__file__).resolve().parent.parent  # installed: this folder is vlm_fast/kernels
if (PACKAGE / "vlm_fast").is_dir():
    PACKAGE = PACKAGE / "vlm_fast"
DIRECTORY = PACKAGE / "configs"
SCHEMA = 1
# What a user's entries hang on, for each kernel of a table: its source, and the list of its
# alternatives. Asked once, and only for kernels that a user's table names.
SOURCES: dict[str, Callable[[], str]] = {}


def table_name(capability: tuple[int, int], gpu: str) -> str:
    return f"sm_{capability[0]}{capability[1]}_{re.sub(r'[^0-9A-Za-z]+', '_', gpu)}.json"


@functools.lru_cache(maxsize=1024)
def winner(kernel: str, dtype: torch.dtype, size: int, device: int) -> int:
    """Index of the config to use; 0, the default, where nothing was measured."""
    return lookup(_table(device), kernel, str(dtype).removeprefix("torch."), size)


def lookup(table: dict[str, Any], kernel: str, dtype: str, size: int) -> int:
    """The entry of the measured size nearest to ``size`` in octaves; ties go to the smaller."""
    measured = table.get(kernel, {}).get(dtype, {})
    if not measured:
        return 0
    octave = math.log2(max(size, 1))
    nearest = min(sorted(map(int, measured)), key=lambda s: abs(math.log2(max(s, 1)) - octave))
    return int(measured[str(nearest)])


def read(path: Path) -> dict[str, Any]:
    """The kernels of one table; empty if the file is missing, broken or of another schema."""
    try:
        content = json.loads(path.read_text())
        if content["schema"] != SCHEMA:
            return {}
        for by_dtype in content["kernels"].values():
            for by_size in by_dtype.values():
                for size, index in by_size.items():
                    if not _user_table.is_entry(size, index):
                        return {}
        return dict(content["kernels"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}  # a table is advice: a bad one must never change a result or raise


def overlaid(shipped: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A user's sizes of a kernel and dtype in the place of the shipped ones."""
    return {**shipped, **{kernel: {**shipped.get(kernel, {}), **own[kernel]} for kernel in own}}


def forget() -> None:
    """Read the tables again at the next launch."""
    for cached in (_table, winner):
        cached.cache_clear()


@functools.cache
def _table(device: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    name = table_name((properties.major, properties.minor), properties.name)
    own = _user_table.find(name, SOURCES)
    if own.wrong:
        _user_table.warn(f"the user table of configs: {own.reason}")
    return overlaid(read(DIRECTORY / name), own.kernels)
