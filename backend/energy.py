"""Energy that a device says it used: NVIDIA's counter, or the processor's if Linux shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
Reader = Callable[[], float]  # joules since some moment


class Energy:
    """Joules from its making to `used`; None where the device reports none."""

    def __init__(self, device: str) -> None:
        self.source, self.why_not = "", ""
        self._wraps = 0.0
        self._read = self._gpu(device) if device.startswith("cuda") else self._processor()
        self._start = self._read() if self._read else 0.0

    def used(self) -> float | None:
        """Joules so far."""
        if self._read is None:
            return None
        used = self._read() - self._start
        return used if used >= 0 else used + self._wraps  # the counter began again

    def _gpu(self, device: str) -> Reader | None:
        try:
            import pynvml

            pynvml.nvmlInit()
            properties: Any = torch.cuda.get_device_properties(torch.device(device))
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except Exception as error:  # every driver has its own way of having no counter
            self.why_not = f"the GPU reports no energy: {type(error).__name__}: {error}"
            return None
        self.source = "the GPU's energy counter, idle power included"
        return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3

    def _processor(self) -> Reader | None:
        packages = sorted(POWERCAP.glob("intel-rapl:[0-9]*"))
        packages = [p for p in packages if p.name.count(":") == 1]
        try:
            self._wraps = sum(whole(p / "max_energy_range_uj") for p in packages) / 1e6
            for package in packages:
                whole(package / "energy_uj")
        except OSError as error:
            self.why_not = f"the processor's energy counter cannot be read: {error.strerror}"
            return None
        if not packages:
            self.why_not = "the processor reports no energy"
            return None
        self.source = "the processor's energy counter, all that runs on it included"
        return lambda: sum(whole(p / "energy_uj") for p in packages) / 1e6


def whole(path: Path) -> int:
    """A number in a file."""
    return int(path.read_text())
