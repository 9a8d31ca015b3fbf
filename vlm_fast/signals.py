"""SIGINT and SIGTERM, which end what runs for long without losing what it has."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def handled(handler: Callable[[int, Any], Any] = signal.default_int_handler) -> Iterator[None]:
    """Inside, both signals call ``handler``; by default they raise KeyboardInterrupt.

    Also where the process began with SIGINT ignored, as in the background of a shell script. Only
    for the main thread.
    """
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
