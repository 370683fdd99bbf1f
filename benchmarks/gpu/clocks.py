"""Clocks, power and what held them back, as nvidia-smi tells it while something is measured.

Where there is no nvidia-smi, or it does not know the device, it says "not available".
"""

import statistics
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

NOT_AVAILABLE = "not available"
EVERY_S = 2.0
PATIENCE_S = 20
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
    """Asks nvidia-smi when it is entered, every two seconds, and when it is left."""

    def __init__(self, command: Sequence[str]) -> None:
        """Know what to ask.

        command: as `query` gives it for `FACTS`; [] asks nothing.
        """
        self._command = command
        self._samples: list[Sample] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="device-watch")

    def __enter__(self) -> "DeviceWatch":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def summary(self) -> dict[str, Any] | str:
        """Return what it was before, after and meanwhile."""
        return summary_of(self._samples)

    def _run(self) -> None:
        is_over = False
        while self._command:
            told = answer(self._command)
            if told is None:
                return
            self._samples += samples_of(told)
            if is_over:
                return
            is_over = self._stop.wait(EVERY_S)


def answer(command: Sequence[str]) -> str | None:
    """Return what nvidia-smi prints; None where it is not installed or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


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
