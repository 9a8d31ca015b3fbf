"""The optional compiled extension (csrc/), or None; its absence is never an error."""

from __future__ import annotations

from typing import Any

native: Any
try:
    from .. import _C as native
except ImportError:
    native = None
