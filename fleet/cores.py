"""Find the CPU cores near each GPU: those of its NUMA node.

A worker whose threads run on another node copies through the link between the two. Where nobody can
say which cores are near, it runs on any.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from fleet.gpus import NVIDIA_SMI_WITHIN_S, cards_of

SYSFS = Path("/sys")


def cores_near(
    gpus: Sequence[str], environment: Mapping[str, str] = os.environ
) -> dict[str, frozenset[int]]:
    """Return the cores near each of these GPUs that this process may use.

    Those of which they are not known, or none of which may be used, are left out. An index is the
    GPU's only where CUDA counts as nvidia-smi does.
    """
    try:
        bus_ids = _bus_ids()
        cards = cards_of(_nvidia_smi("-L"))
    except (OSError, subprocess.SubprocessError):
        return {}
    counts_alike = environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    allowed = os.sched_getaffinity(0)
    found = {}
    for gpu in gpus:
        if gpu.isdigit() and not counts_alike:
            continue
        bus_id = bus_ids.get(cards.get(gpu, gpu), "")
        cores = _cores_of(bus_id) & allowed if bus_id else frozenset()
        if cores:
            found[gpu] = cores
    return found


def parse_cores(listed: str) -> frozenset[int]:
    """Parse the kernel's list of cores, such as "0-15,64-79"."""
    cores: set[int] = set()
    for part in filter(None, listed.strip().split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)


def _bus_ids() -> dict[str, str]:
    """Return each card's place on the PCI bus as sysfs names it, by its UUID and by its index."""
    found = {}
    told = _nvidia_smi("--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader")
    for line in told.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) == 3:
            index, uuid, bus_id = values
            domain, _, rest = bus_id.lower().partition(":")
            found[index] = found[uuid] = f"{domain[-4:]}:{rest}"
    return found


def _nvidia_smi(*arguments: str) -> str:
    return subprocess.run(
        ["nvidia-smi", *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=NVIDIA_SMI_WITHIN_S,
    ).stdout


def _cores_of(bus_id: str) -> frozenset[int]:
    """Return the cores of a PCI device's NUMA node; none where the host has one node or says none.

    A host with one node says -1.
    """
    folder = SYSFS / "bus/pci/devices" / bus_id
    try:
        if int((folder / "numa_node").read_text()) < 0:
            return frozenset()
        return parse_cores((folder / "local_cpulist").read_text())
    except (OSError, ValueError):
        return frozenset()
