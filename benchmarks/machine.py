"""Where and under what conditions results were measured, and the file that holds them."""

from __future__ import annotations

import datetime
import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlm_fast import __version__, environment, evidence
from vlm_fast.kernels import _native
from vlm_fast.op import OPS

VERSIONS = ("torch", "triton", "transformers")


def name(device: str) -> str:
    return environment.processor() if device == "cpu" else torch.cuda.get_device_name()


def description(device: str) -> dict[str, Any]:
    """What every results file begins with: see `vlm_fast.evidence` for what reads it."""
    described = {
        "schema": evidence.SCHEMA,
        "device": device,
        "machine": name(device),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": evidence.commit(),
        "versions": {
            "vlm_fast": __version__,
            **{package: environment.version_of(package) for package in VERSIONS},
        },
        "compiled_extension": _native.native is not None,
        "sources": {op.name: evidence.sources(op) for op in OPS.values()},
    }
    if device == "cpu":
        return {**described, "threads": 1}  # see timing.one_thread
    major, minor = torch.cuda.get_device_capability()
    return {**described, "cuda": torch.version.cuda, "capability": f"sm_{major}{minor}"}


def clocks() -> dict[str, Any]:
    """Clocks, power and what holds them back, of the current GPU; the reason where NVML has none.

    The device is found by its PCI address: NVML numbers devices otherwise than CUDA.
    """
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        address = (
            f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}"
            f":{properties.pci_device_id:02x}.0"
        )
        handle = nvml.nvmlDeviceGetHandleByPciBusId(address.encode())
    except Exception as error:  # a condition that cannot be read is no reason to lose the results
        return {"unknown": f"{type(error).__name__}: {error}"}
    readings = {
        "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "clock_event_reasons": lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
    }
    found: dict[str, Any] = {}
    for reading, read in readings.items():
        try:
            found[reading] = read()
        except Exception as error:
            found[reading] = None
            found.setdefault("unknown", f"{type(error).__name__}: {error}")
    return found


def results_file(machine: str) -> Path:
    return evidence.RESULTS / f"{re.sub(r'[^0-9A-Za-z]+', '_', machine).strip('_')}.json"


def write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
