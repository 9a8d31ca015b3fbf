"""Measured times of connectors from results files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_fast.advisor.connectors import Connector
from vlm_fast.advisor.model_shapes import ModelShape
from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import results_files

STATE = "after"  # the benchmark's name for the patched model


@dataclass(frozen=True)
class Measurement:
    """A time from a results file.

    Attributes:
        part: what was timed, in the file's words.
        seconds: median.
        lower, upper: quartiles.
        dtype: as text.
        machine: name of the GPU or CPU.
        current: whether the ops that it depends on have the same source now.
    """

    part: str
    seconds: float
    lower: float
    upper: float
    dtype: str
    machine: str
    current: bool

    def __str__(self) -> str:
        source = "at this source" if self.current else "at an older source"
        return (
            f"{self.part}: {self.seconds * 1e3:.3g} ms ({self.lower * 1e3:.3g}-"
            f"{self.upper * 1e3:.3g}), {self.dtype}, measured on {self.machine}, {source}"
        )


def measurements(
    connector: Connector, model: ModelShape, results: Sequence[dict[str, Any]] | None = None
) -> list[Measurement]:
    """The measurements of a connector.

    Args:
        connector: the connector.
        model: its vision encoder decides which measurements apply.
        results: contents of results files; None reads all of them.
    """
    results = results_files.read_results() if results is None else results
    return [found for result in results for found in _of(connector, model, result)]


def _of(connector: Connector, model: ModelShape, result: dict[str, Any]) -> Iterator[Measurement]:
    sources = result.get("sources", {})
    current = bool(connector.ops) and all(
        sources.get(name) == results_files.sources(OPS[name]) for name in connector.ops
    )
    for family, beginning, width in connector.results:
        if width != model.tower.width:
            continue
        found = result
        for level in family.split("."):
            found = found.get(level, {})
        for row in found.get("rows", []):
            if row.get("state") == STATE and row["part"].startswith(beginning):
                words = f"{found['model']}: " if "model" in found else ""
                yield Measurement(
                    words + row["part"], row["median"], row["lower"], row["upper"],
                    found.get("dtype", "unknown"), result["machine"], current,
                )  # fmt: skip
