"""Keep requests below a rate."""

from __future__ import annotations

import time
from collections.abc import Callable


class RateLimit:
    """Spaces calls of `wait` evenly, at most ``per_minute`` of them in a minute.

    Args:
        per_minute: requests a minute, greater than 0.
        clock: returns seconds that never decrease.
        sleep: waits for a number of seconds.

    Raises:
        ValueError: ``per_minute`` is not greater than 0.
    """

    def __init__(
        self,
        per_minute: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not per_minute > 0:
            raise ValueError(f"per_minute is {per_minute}, expected more than 0")
        self._interval, self._clock, self._sleep = 60 / per_minute, clock, sleep
        self._next = clock()

    def wait(self) -> None:
        """Return as soon as the next request may be sent."""
        now = self._clock()
        if now < self._next:
            self._sleep(self._next - now)
        self._next = max(self._next, now) + self._interval
