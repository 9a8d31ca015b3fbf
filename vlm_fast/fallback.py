"""Fallbacks to plain PyTorch: process-wide switches, warnings and call counts.

Two environment variables are read once, at import: ``VLM_FAST_STRICT=1`` turns every fallback into
an error, ``VLM_FAST_DISABLE=1`` makes every op run its reference.
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
    """Warned once per op and reason: a call ran as plain PyTorch instead of the fused op."""


class VlmFastFallbackError(RuntimeError):
    """Raised under `strict` where a call would run as plain PyTorch instead of the fused op."""


def environment_switch(name: str) -> bool:
    """Whether the environment variable ``name`` is on: 1, true, on or yes.

    Unset, empty, 0, false, off and no mean off. Anything else gives a warning and means off.
    """
    value = os.environ.get(name, "").strip().lower()
    if value in ("", "0", "false", "off", "no"):
        return False
    if value not in ("1", "true", "on", "yes"):
        warnings.warn(f"{name}={value!r} is not a switch (0 or 1); ignored", stacklevel=2)
        return False
    return True


class Switch:
    """A flag that is on while at least one thread or task is inside a `held` context."""

    def __init__(self, on: bool = False) -> None:
        self.on = on  # a plain attribute: compiled graphs guard on it
        self._holders = int(on)
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Turn the switch on inside this context. Contexts may end in any order."""
        self._add(1)
        try:
            yield
        finally:
            self._add(-1)

    def _add(self, count: int) -> None:
        if torch.compiler.is_compiling():  # Dynamo cannot trace locks; it replays both assignments
            self._holders += count
            self.on = self._holders > 0
            return
        with self._lock:
            self._holders += count
            self.on = self._holders > 0


class _Switches:
    """The switches `strict` and `disabled` of the process."""

    def __init__(self) -> None:
        self.strict_switch = Switch(environment_switch("VLM_FAST_STRICT"))
        self.disabled_switch = Switch(environment_switch("VLM_FAST_DISABLE"))

    @property
    def strict(self) -> bool:
        return self.strict_switch.on

    @property
    def disabled(self) -> bool:
        return self.disabled_switch.on


switches = _Switches()
fast_calls: Counter[str] = Counter()  # of each op on its fused path
_fallbacks: defaultdict[str, Counter[str]] = defaultdict(Counter)
_warned: set[tuple[str, str]] = set()

DISABLED = "disabled by vlm_fast.disabled() or VLM_FAST_DISABLE"


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Inside this context a call that would fall back raises `VlmFastFallbackError`.

    The whole process is affected, until the last thread or task has left its context.
    """
    with switches.strict_switch.held():
        yield


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Inside this context every op runs its plain PyTorch reference.

    The whole process is affected, until the last thread or task has left its context.
    """
    with switches.disabled_switch.held():
        yield


def stats(*, reset: bool = False) -> dict[str, dict[str, object]]:
    """Calls so far: ``{name: {"fast": count, "fallback": {reason: count}}}``.

    Calls inside a compiled graph are not counted, because they do not run Python. ``reset`` sets
    all counts to zero afterwards.
    """
    names = sorted({*fast_calls, *_fallbacks})
    counts: dict[str, dict[str, object]] = {
        name: {"fast": fast_calls[name], "fallback": dict(_fallbacks[name])} for name in names
    }
    if reset:
        fast_calls.clear()
        _fallbacks.clear()
    return counts


def record_fast_call(name: str) -> None:
    """Count a call of an op that ran on its fused path."""
    fast_calls[name] += 1


def record_fallback(name: str, reason: str, *, stacklevel: int = 3) -> None:
    """Count a fallback of ``name`` and warn the first time; under `strict` raise instead.

    Nothing happens under `disabled` and while compiling.

    Raises:
        VlmFastFallbackError: under `strict`.
    """
    if reason is DISABLED or torch.compiler.is_compiling():
        return
    if switches.strict:
        raise VlmFastFallbackError(f"vlm_fast.{name}: {reason}")
    _fallbacks[name][reason] += 1
    if (name, reason) not in _warned:
        _warned.add((name, reason))
        warnings.warn(
            f"vlm_fast.{name} runs as plain PyTorch: {reason}",
            VlmFastFallbackWarning,
            stacklevel=stacklevel,
        )
