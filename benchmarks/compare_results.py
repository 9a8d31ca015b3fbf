"""Compare a run with an earlier one of the same machine, and list ops that are slower or larger.

Times are compared as shares of eager PyTorch's time in the same run, so a busy machine is no
regression. Bytes are compared directly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_fast import terminal
from vlm_fast.benchmarks.providers import EAGER, OURS
from vlm_fast.benchmarks.result_rows import Row, by_provider
from vlm_fast.verification import results_files

BYTES = ("saved_bytes", "peak_bytes")
SLACK = 1.02  # allowed growth of bytes, because allocations are rounded


def read(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        ValueError: the file cannot be read, is not a results file, or has another schema. The
            message says what to do.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON; write one with vlm-fast bench --json") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != results_files.SCHEMA:
        raise ValueError(
            f"{path} has schema {schema!r} where {results_files.SCHEMA} is read: "
            "measure it again with vlm-fast bench --json"
        )
    return dict(content)


def why_not(old: Mapping[str, Any], machine: str) -> str | None:
    """The reason why an earlier file cannot be compared with a run on this machine, or None."""
    if old["machine"] != machine:
        return f"was measured on {old['machine']}, and this is {machine}"
    return None if old.get("ops") else "holds no rows of ops; measure them with --section ops"


def regressions(old: Sequence[Row], new: Sequence[Row], allowed: float) -> Iterator[str]:
    """Yield a sentence for each row of ours that is slower by more than ``allowed``, or larger.

    ``allowed`` is a share: 0.05 is 5 %. A row is slower only if the quartiles of the two runs do
    not overlap.
    """
    before, after = by_provider(old), by_provider(new)
    for key in after.keys() & before.keys():
        a, b = before[key], after[key]
        what = f"{key[0]}, {key[1]}, {key[4]}"
        if EAGER in a and EAGER in b and OURS in a and OURS in b:
            then, now = (ours["median"] / eager["median"] for ours, eager in pairs(a, b))
            best = b[OURS]["lower"] / b[EAGER]["median"]
            worst = a[OURS]["upper"] / a[EAGER]["median"]
            if now > then * (1 + allowed) and best > worst:
                yield f"{what}: takes {now:.2f} of eager's time, took {then:.2f}"
        if OURS in a and OURS in b:
            for name in BYTES:
                if b[OURS][name] > a[OURS][name] * SLACK:
                    yield f"{what}: {name} {b[OURS][name]}, were {a[OURS][name]}"


def pairs(a: Mapping[str, Row], b: Mapping[str, Row]) -> Iterator[tuple[Row, Row]]:
    return ((rows[OURS], rows[EAGER]) for rows in (a, b))


def show(old: Mapping[str, Any], new: Sequence[Row], allowed: float) -> list[str]:
    """Print and return the regressions; say how many rows both runs have."""
    found = sorted(regressions(old["ops"], new, allowed))
    shared = len(by_provider(old["ops"]).keys() & by_provider(new).keys())
    title = f"against commit {old.get('commit')}, {old['date']}: {shared} rows in both"
    terminal.show(title, ("slower or larger",), [(line,) for line in found or ["none"]])
    return found
