"""Clocks, power and what held them back, as nvidia-smi tells it while something is measured.

Where there is no nvidia-smi, or it does not know the device, it says "not available".
"""

import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any

import torch

NOT_AVAILABLE = "not available"
EVERY_MS = 500
PATIENCE_S = 10
FACTS = (
    "clocks.sm",
    "clocks.mem",
    "power.draw",
    "temperature.gpu",
    "clocks_event_reasons.active",
)
# Bits of the last fact, as NVML names them; idleness holds nothing back.
REASONS = {
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}


@dataclass(frozen=True)
class Sample:
    """The device at one moment."""

    sm_mhz: float
    memory_mhz: float
    power_w: float
    temperature_c: float
    reasons: tuple[str, ...]


class DeviceWatch:
    """Asks nvidia-smi twice a second while it is entered."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._samples: list[Sample] = []

    def __enter__(self) -> "DeviceWatch":
        command = query(self._device, FACTS)
        if command:
            self._output = tempfile.TemporaryFile()
            try:
                self._process = subprocess.Popen(
                    [*command, f"--loop-ms={EVERY_MS}"],
                    stdout=self._output,
                    stderr=subprocess.DEVNULL,
                )
            except OSError:
                self._process = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(PATIENCE_S)
        if self._output is not None:
            self._output.seek(0)
            self._samples = samples_of(self._output.read().decode(errors="replace"))
            self._output.close()

    def summary(self) -> dict[str, Any] | str:
        """Return what it was before, after and meanwhile."""
        return summary_of(self._samples)


def query(device: str, facts: Sequence[str]) -> list[str]:
    """Return the command that asks nvidia-smi about this device; [] where it is no GPU."""
    if not device.startswith("cuda"):
        return []
    uuid = torch.cuda.get_device_properties(torch.device(device)).uuid
    return [
        "nvidia-smi",
        f"--id=GPU-{uuid}",
        f"--query-gpu={','.join(facts)}",
        "--format=csv,noheader,nounits",
    ]


def samples_of(text: str) -> list[Sample]:
    """Read what nvidia-smi printed for `FACTS`, a line a sample.

    Lines with what is no number, such as "[N/A]", are left out.
    """
    samples = []
    for line in text.splitlines():
        *numbers, reasons = [field.strip() for field in line.split(",")]
        try:
            sm_mhz, memory_mhz, power_w, temperature_c = map(float, numbers)
            bits = int(reasons, 16)
        except ValueError:
            continue
        named = tuple(name for bit, name in REASONS.items() if bits & bit)
        samples.append(Sample(sm_mhz, memory_mhz, power_w, temperature_c, named))
    return samples


def summary_of(samples: Sequence[Sample]) -> dict[str, Any] | str:
    """Return the first and the last sample, and the least, median and most of all."""
    if not samples:
        return NOT_AVAILABLE
    numbers = ("sm_mhz", "memory_mhz", "power_w", "temperature_c")
    values = {name: [getattr(sample, name) for sample in samples] for name in numbers}
    reasons = {name for sample in samples for name in sample.reasons}
    return {
        "samples": len(samples),
        "before": {name: each[0] for name, each in values.items()},
        "after": {name: each[-1] for name, each in values.items()},
        "meanwhile": {
            name: [min(each), statistics.median(each), max(each)] for name, each in values.items()
        },
        "held_back_by": sorted(reasons),
    }
