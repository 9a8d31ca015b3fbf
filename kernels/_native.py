"""The optional compiled extension (csrc/), or None; its absence is never an error."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

native: ModuleType | None
try:
    native = import_module(".._C", __package__)
except ImportError:
    native = None
