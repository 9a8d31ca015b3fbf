"""The compiled extension for CPUs (csrc/), or None if it was not built."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

native: ModuleType | None
try:
    native = import_module(".._C", __package__)
except ImportError:
    native = None
