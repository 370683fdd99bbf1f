"""Find the GPUs of this host, or the instances that a GPU is divided into (MIG), by nvidia-smi.

Nothing here touches CUDA: a process that did could not give each of its children one GPU alone.
"""

import re
import shutil
import subprocess
from pathlib import Path

# "GPU 0: NVIDIA H200 (UUID: GPU-8f6e…)", and below it, indented, its instances.
LISTED = re.compile(r"^\s*\S.*\(UUID: (?P<uuid>(?:GPU|MIG)-[^)\s]+)\)\s*$")
DEVICE_FILES = "nvidia[0-9]*"
NVIDIA_SMI_WITHIN_S = 60  # without persistence mode it starts the driver, some seconds a GPU


class NoUsableGpu(Exception):
    """A GPU is asked for, or is there, and cannot be used: repair the driver, or set DEVICE=cpu."""


def gpus_to_use(
    device: str, cuda_visible_devices: str | None, dev: Path = Path("/dev")
) -> tuple[list[str], list[str]]:
    """Return the ids of the GPUs to start workers on, and what is to be told of the others.

    Args:
        device: the setting DEVICE; cuda:N is the N-th of the visible GPUs.
        cuda_visible_devices: the ids to choose from; None = all that nvidia-smi lists.
        dev: the folder of device files.

    Returns:
        Ids for CUDA_VISIBLE_DEVICES, none where the worker belongs on the CPU; and sentences.

    Raises:
        NoUsableGpu: DEVICE asks for a GPU, or the host has some, and none can be used.
    """
    if device == "cpu":
        return [], []
    warnings: list[str] = []
    if cuda_visible_devices is not None:
        given = [gpu.strip() for gpu in cuda_visible_devices.split(",")]
        gpus = [gpu for gpu in given if gpu not in ("", "-1")]
        if not gpus and device != "auto":
            raise NoUsableGpu(f"DEVICE is {device}, and CUDA_VISIBLE_DEVICES names no GPU")
    else:
        gpus, warnings = _listed()
        if not gpus and (device != "auto" or warnings or any(dev.glob(DEVICE_FILES))):
            reason = "; ".join(warnings) or "nvidia-smi is not there or lists no GPU"
            raise NoUsableGpu(
                f"no GPU can be used: {reason}. Repair the driver, or set DEVICE=cpu to have a "
                "worker on the CPU"
            )
    return _chosen(device, gpus), warnings


def parse_listed(lines: str) -> tuple[list[str], list[str]]:
    """Parse what `nvidia-smi -L` prints: ids of GPUs or of their instances, and all other lines.

    A GPU that is divided into instances is left out: CUDA uses one instance of it at most. A GPU
    in MIG mode without instances is one that CUDA cannot use, and stays in: its worker says so.
    """
    gpus: list[str] = []
    others: list[str] = []
    for line in filter(str.strip, lines.splitlines()):
        if listed := LISTED.match(line):
            uuid = listed["uuid"]
            if uuid.startswith("MIG-") and gpus and gpus[-1].startswith("GPU-"):
                gpus.pop()  # the card of this instance
            gpus.append(uuid)
        else:
            others.append(line.strip())
    return gpus, others


def cards_of(lines: str) -> dict[str, str]:
    """Return the card of every instance that `nvidia-smi -L` prints."""
    cards: dict[str, str] = {}
    card = ""
    for line in lines.splitlines():
        if listed := LISTED.match(line):
            if listed["uuid"].startswith("GPU-"):
                card = listed["uuid"]
            else:
                cards[listed["uuid"]] = card
    return cards


def _listed() -> tuple[list[str], list[str]]:
    """Return what nvidia-smi lists, and what it says besides; one lost GPU hides no other."""
    if shutil.which("nvidia-smi") is None:
        return [], []
    try:
        answer = subprocess.run(
            ["nvidia-smi", "-L"],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=NVIDIA_SMI_WITHIN_S,
        )
    except subprocess.TimeoutExpired:
        return [], [f"nvidia-smi did not answer within {NVIDIA_SMI_WITHIN_S} s"]
    gpus, others = parse_listed(answer.stdout)
    others += [line.strip() for line in answer.stderr.splitlines() if line.strip()]
    return gpus, [f"nvidia-smi says: {line}" for line in others]


def _chosen(device: str, gpus: list[str]) -> list[str]:
    """Return the one that DEVICE numbers, or all."""
    _, _, number = device.partition(":")
    if not number:
        return gpus
    if int(number) >= len(gpus):
        raise NoUsableGpu(f"DEVICE is {device}, and {len(gpus)} GPUs are visible")
    return [gpus[int(number)]]
