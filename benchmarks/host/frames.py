"""The Python functions that one call of a patched connector runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from vlm_fast.benchmarks.host import devices
from vlm_fast.benchmarks.host.connector import Connector
from vlm_fast.benchmarks.host.measure import build, creating, inference, training


def functions(call: Callable[[], Any]) -> list[str]:
    """File and name of each Python function that a repeated call runs, indented by depth.

    What autograd runs in a thread of its own, as for a GPU, is not among them.
    """
    found: list[str] = []
    depth = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal depth
        if event == "call":
            code = frame.f_code
            found.append(f"{'  ' * depth}{Path(code.co_filename).name}:{code.co_name}")
        depth += {"call": 1, "return": -1}.get(event, 0)

    for _ in range(3):
        call()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def show(connector: Connector, batch: int) -> None:
    """Print the functions of an inference call and of a training step."""
    before, after = build(connector)
    if devices.is_stub():
        devices.set_read(connector.counted(batch))
    with creating("cuda"):
        given = connector.given(batch)
    for make in (inference, training):
        count = len(functions(make(connector, before, given)))
        lines = functions(make(connector, after, given))
        title = f"{connector.name}, batch {batch}, {make.__name__}"
        print(f"{title}: {count} functions -> {len(lines)}", *lines, "", sep="\n")
