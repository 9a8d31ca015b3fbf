"""Triton if it is installed, else placeholders with which kernel files can be imported."""

from __future__ import annotations

import os
from typing import Any

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:
    AVAILABLE = False

    class _Absent:
        """A placeholder for use in definitions (`tl.constexpr(0.5)`, `@triton.jit`) only."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **options: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) else self

    triton = tl = _Absent()

INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET") == "1"
