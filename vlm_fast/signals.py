"""Handle SIGINT and SIGTERM, so that a long run can stop without losing its results."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def handled(handler: Callable[[int, Any], Any] = signal.default_int_handler) -> Iterator[None]:
    """Inside this context SIGINT and SIGTERM call ``handler``.

    The default handler raises KeyboardInterrupt.

    This holds even if the process was started with SIGINT ignored, as shells do for background
    jobs. Only the main thread may use it. The former handlers are restored at the end.
    """
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
