"""No more requests than an endpoint allows."""

from __future__ import annotations

import time
from collections.abc import Callable


class RateLimit:
    """Lets ``rate`` through in a minute, and up to ``burst`` at once after a pause.

    Args:
        rate: a minute.
        burst: at least 1.
        clock: seconds that only grow.
        sleep: waits for seconds.
    """

    def __init__(
        self,
        rate: float,
        burst: float = 1.0,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not rate > 0 or not burst >= 1:
            raise ValueError(f"rate is {rate} and burst {burst}, expected above 0 and at least 1")
        self.rate, self.burst, self.clock, self.sleep = rate, burst, clock, sleep
        self._tokens, self._at = burst, clock()

    def take(self) -> None:
        """Wait until one may pass."""
        while True:
            now = self.clock()
            self._tokens = min(self.burst, self._tokens + (now - self._at) * self.rate / 60)
            self._at = now
            # What is rounded off in waiting for a whole one must not make it wait again.
            if self._tokens >= 1 - 1e-9:
                self._tokens -= 1
                return
            self.sleep((1 - self._tokens) * 60 / self.rate)
