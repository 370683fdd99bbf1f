"""The most memory that was used on a GPU; nothing is known of a CPU's."""

import torch


def forget_peaks(device: str) -> None:
    """Measure peaks from now on."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(torch.device(device))


def peaks(device: str) -> dict[str, int]:
    """Return the most that tensors took, and that was reserved for them.

    Reserved are also the pools of CUDA graphs, in which no tensor shows.
    """
    if not device.startswith("cuda"):
        return {"peak_bytes": 0, "reserved_bytes": 0}
    here = torch.device(device)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(here),
        "reserved_bytes": torch.cuda.max_memory_reserved(here),
    }
