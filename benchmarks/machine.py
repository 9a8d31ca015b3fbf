"""The head of a results file (machine, versions, commit), its name, and how it is written."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlm_fast import __version__
from vlm_fast.atomic_write import write_atomically
from vlm_fast.devtools import environment
from vlm_fast.kernels import _native
from vlm_fast.ops.declaration import OPS
from vlm_fast.verification import results_files

VERSIONS = ("torch", "triton", "transformers")


def name(device: str) -> str:
    return environment.processor() if device == "cpu" else torch.cuda.get_device_name()


def description(device: str) -> dict[str, Any]:
    """Return the head of a results file, which `vlm_fast.verification.results_files` reads."""
    described = {
        "schema": results_files.SCHEMA,
        "device": device,
        "machine": name(device),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": results_files.commit(),
        "versions": {
            "vlm_fast": __version__,
            **{package: environment.version_of(package) for package in VERSIONS},
        },
        "compiled_extension": _native.native is not None,
        "sources": {op.name: results_files.sources(op) for op in OPS.values()},
    }
    if device == "cpu":
        return {**described, "threads": 1}  # see timing.one_thread
    major, minor = torch.cuda.get_device_capability()
    return {**described, "cuda": torch.version.cuda, "capability": f"sm_{major}{minor}"}


def results_file(machine: str) -> Path:
    return results_files.RESULTS / f"{re.sub(r'[^0-9A-Za-z]+', '_', machine).strip('_')}.json"


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a results file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # NaN is not JSON: raise here, and not in whoever reads the file.
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
