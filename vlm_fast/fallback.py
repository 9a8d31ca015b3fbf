"""The switches and counters of the whole process: strict, disabled, warnings, statistics.

Environment: ``VLM_FAST_STRICT=1`` turns every fallback into an error, ``VLM_FAST_DISABLE=1`` sends
every call to its reference. Both are read here, once, at import.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator

import torch


class VlmFastFallbackWarning(UserWarning):
    """A call that the fast path cannot serve was served by plain PyTorch instead."""


class VlmFastFallbackError(RuntimeError):
    """The same under `strict`."""


def _switch(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value in ("", "0", "false", "off", "no"):
        return False
    if value not in ("1", "true", "on", "yes"):
        warnings.warn(f"{name}={value!r} is not a switch (0 or 1); ignored", stacklevel=2)
        return False
    return True


class Switch:
    """On while anyone holds it. Threads and tasks may leave in another order than they came."""

    def __init__(self, on: bool = False) -> None:
        self.on = on  # a plain attribute, which compiled graphs guard
        self._holders = int(on)
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the switch within."""
        self._add(1)
        try:
            yield
        finally:
            self._add(-1)

    def _add(self, count: int) -> None:
        if torch.compiler.is_compiling():  # Dynamo knows no locks; it replays both assignments
            self._holders += count
            self.on = self._holders > 0
            return
        with self._lock:
            self._holders += count
            self.on = self._holders > 0


class _Switches:
    def __init__(self) -> None:
        self.strict_switch = Switch(_switch("VLM_FAST_STRICT"))
        self.disabled_switch = Switch(_switch("VLM_FAST_DISABLE"))

    @property
    def strict(self) -> bool:
        return self.strict_switch.on

    @property
    def disabled(self) -> bool:
        return self.disabled_switch.on


switches = _Switches()
_fast: Counter[str] = Counter()
_fallbacks: defaultdict[str, Counter[str]] = defaultdict(Counter)
_warned: set[tuple[str, str]] = set()

DISABLED = "disabled by vlm_fast.disabled() or VLM_FAST_DISABLE"


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Raise `VlmFastFallbackError` where a call would fall back.

    Holds for the whole process, until the last thread or task that is within has left.
    """
    with switches.strict_switch.held():
        yield


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Send every call to its reference.

    Holds for the whole process, until the last thread or task that is within has left.
    """
    with switches.disabled_switch.held():
        yield


def stats(*, reset: bool = False) -> dict[str, dict[str, object]]:
    """Calls so far: ``{name: {"fast": count, "fallback": {reason: count}}}``.

    Calls inside a compiled graph are not counted: Python does not see them.
    """
    names = sorted({*_fast, *_fallbacks})
    counts: dict[str, dict[str, object]] = {
        name: {"fast": _fast[name], "fallback": dict(_fallbacks[name])} for name in names
    }
    if reset:
        _fast.clear()
        _fallbacks.clear()
    return counts


def record_fast_call(name: str) -> None:
    _fast[name] += 1


def record_fallback(name: str, reason: str) -> None:
    """Count a fallback; warn the first time, raise under `strict`."""
    if reason is DISABLED or torch.compiler.is_compiling():
        return
    if switches.strict:
        raise VlmFastFallbackError(f"vlm_fast.{name}: {reason}")
    _fallbacks[name][reason] += 1
    if (name, reason) not in _warned:
        _warned.add((name, reason))
        warnings.warn(
            f"vlm_fast.{name} runs as plain PyTorch: {reason}", VlmFastFallbackWarning, stacklevel=3
        )
