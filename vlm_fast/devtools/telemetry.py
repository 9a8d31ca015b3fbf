"""Sample clocks, power, temperature and throttling reasons of the GPU during a measurement.

They are read by NVML (package nvidia-ml-py). The device is identified by its PCI address, because
NVML and CUDA number devices differently.
"""

from __future__ import annotations

import importlib
import statistics
import threading
from collections.abc import Callable
from typing import Any

import torch

INTERVAL = 0.025  # seconds between samples
# Bits of nvmlDeviceGetCurrentClocksEventReasons, as nvml.h names them.
REASONS = {
    0x1: "idle", 0x2: "application clocks", 0x4: "software power cap", 0x8: "hardware slowdown",
    0x10: "sync boost", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown",
    0x80: "hardware power brake", 0x100: "display clocks",
}  # fmt: skip
# Reasons that make the GPU slower than requested.
THROTTLING = 0x4 | 0x8 | 0x20 | 0x40 | 0x80


class Telemetry:
    """A context manager: ``with Telemetry(device) as seen: ...``, then ``seen.summary()``.

    Args:
        device: "cuda" for the current GPU, or "cpu", of which nothing is read.
    """

    def __init__(self, device: str) -> None:
        self.samples: list[dict[str, Any]] = []
        # reason by reading, or by "telemetry" if nothing can be read
        self.lacks: dict[str, str] = {}
        self._readings: dict[str, Callable[[], Any]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="vlm_fast telemetry", daemon=True)
        if device == "cpu":
            self.lacks["telemetry"] = "no GPU is used"
            return
        try:
            self._readings = _readings()
        except Exception as error:  # a failure to read must not lose the measurement
            self.lacks["telemetry"] = f"{type(error).__name__}: {error}"

    def __enter__(self) -> Telemetry:
        if self._readings:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._readings:
            self._sample()  # short measurements have at least one sample

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._sample()

    def _sample(self) -> None:
        sample: dict[str, Any] = {}
        for name, read in list(self._readings.items()):
            try:
                sample[name] = read()
            except Exception as error:  # not supported, not permitted, or the GPU was lost
                self.lacks[name] = f"{type(error).__name__}: {error}"
                sample[name] = None
        self.samples.append(sample)

    def summary(self) -> dict[str, Any]:
        """Medians of the readings, and all throttling reasons that were seen.

        Returns:
            ``sm_mhz``, ``memory_mhz``, ``power_w``, ``power_limit_w``, ``temperature_c`` (None if
                unknown), ``throttled`` (list of reasons) and ``lacks`` ({reading: why it could not
                be read}).
        """
        found: dict[str, Any] = {name: self._median(name) for name in MEASURED}
        bits = 0
        for sample in self.samples:
            bits |= sample.get("event_reasons") or 0
        found["throttled"] = [REASONS[bit] for bit in REASONS if bit & bits & THROTTLING]
        found["lacks"] = dict(self.lacks)
        return found

    def _median(self, name: str) -> float | None:
        values = [sample[name] for sample in self.samples if sample.get(name) is not None]
        return statistics.median(values) if values else None


MEASURED = ("sm_mhz", "memory_mhz", "power_w", "power_limit_w", "temperature_c")


def _readings() -> dict[str, Callable[[], Any]]:
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    address = (
        f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}"
        f":{properties.pci_device_id:02x}.0"
    )
    gpu = nvml.nvmlDeviceGetHandleByPciBusId(address.encode())
    return {
        "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
        "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
        "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
        "event_reasons": lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu),
    }
