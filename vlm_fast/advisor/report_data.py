"""A profile as data: JSON with a fixed schema, and CSV."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vlm_fast import terminal
from vlm_fast.advisor.model_shapes import ModelShape
from vlm_fast.advisor.profile_points import LayerGroup, PointGroup, ProfileRow
from vlm_fast.devtools import environment
from vlm_fast.devtools.timing import Ceilings
from vlm_fast.kernels import _native
from vlm_fast.verification import results_files

FORMAT, VERSION = "vlm_fast.profile", 1
PACKAGES = ("vlm_fast", "torch", "triton")
NOTES = (
    "Measured: time and memory of the connector, alternatives in turns; and, where there was time, "
    "a layer of the language model, with random weights of this shape.",
    "Multiplied: all layers of the language model are one layer's time, times their number; gated "
    "blocks likewise.",
    "Extrapolated: where a length was not timed, its counted FLOPs at the rate of the timed layer "
    "nearest in size.",
    "Modelled: where no layer was timed, counted FLOPs at the rate of a large matrix product, "
    "measured in this run.",
    "Counted: FLOPs and bytes, by the ops' cost models and torch's formulas; keys and values.",
    "Not in it: the vision tower, the embedding, the head, the optimizer.",
    "Tokens seen of an image stand for quality, which is not measured.",
)


def conditions(device: str, dtype: torch.dtype, best: Ceilings) -> dict[str, Any]:
    """Where and how a profile is measured.

    Args:
        device: "cpu" or "cuda".
        dtype: of everything.
        best: measured rates of the machine.
    """
    name = environment.processor() if device == "cpu" else torch.cuda.get_device_name()
    return {
        "machine": name,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": results_files.commit(),
        "versions": {package: environment.version_of(package) for package in PACKAGES},
        "compiled_extension": _native.native is not None,
        "matmul_flops_per_second": best.matmul_flops_per_second,
        "copy_bytes_per_second": best.copy_bytes_per_second,
    }


def document(
    name: str,
    model: ModelShape,
    groups: Sequence[PointGroup | LayerGroup],
    request: dict[str, Any],
    where: dict[str, Any],
    started: float,
    unfinished: str | None,
) -> dict[str, Any]:
    """A profile as JSON data, described by `schema`.

    Args:
        name: of the model's shape.
        model: the shape.
        groups: measured groups.
        request: mode, text, tokens, batches, levels, connectors and budget.
        where: result of `conditions`.
        started: ``time.monotonic`` at the start.
        unfinished: why points were left out, or None.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "unfinished": unfinished,
        "model": {"name": name, **asdict(model)},
        "request": request,
        "conditions": {**where, "seconds": time.monotonic() - started},
        "notes": list(NOTES),
        "rows": [
            _plain(row) for group in groups if isinstance(group, PointGroup) for row in group.rows
        ],
    }


def _plain(row: ProfileRow) -> dict[str, Any]:
    point = row.point
    found = {k: v for k, v in asdict(row).items() if k not in ("point", "timed_flops")}
    return {
        "connector": point.connector, "title": row.title, "tokens": point.tokens,
        "batch": point.prompts, "saved": point.saved, **found,
    }  # fmt: skip


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write one line per point; nested values get dotted names, and no cell is a formula."""
    terminal.write_csv(path, [dict(_flat(row)) for row in rows])


def _flat(value: Any, name: str = "") -> Any:
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else key)
    else:
        yield name, value
