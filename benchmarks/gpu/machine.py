"""Where it was measured: the device, its driver and the libraries."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.gpu.clocks import NOT_AVAILABLE, answer, query

PACKAGES = ("torch", "diffusers", "transformers", "triton", "numpy")


def machine(device: str) -> dict[str, Any]:
    """Describe the machine."""
    facts: dict[str, Any] = {
        "device": device,
        "python": platform.python_version(),
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(torch.device(device))
        facts |= {
            "gpu": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "driver": _nvidia_smi(device, "driver_version"),
            "power_limit_w": _nvidia_smi(device, "power.limit"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nvidia_smi(device: str, fact: str) -> str:
    """Ask it of this GPU."""
    told = answer(query(device, [fact]))
    return NOT_AVAILABLE if told is None else told.split("\n")[0].strip()
