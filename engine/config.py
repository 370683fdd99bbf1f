"""What an engine is started with: the device and its limits, and the checkpoints it holds.

Plain values. Whoever reads the environment or the catalog turns them into these.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One device and how much of it to use."""

    device: str = "cpu"  # "cpu" or "cuda:0"
    num_threads: int = 1  # torch threads on a CPU; never more than free cores. Part of the fingerprint
    max_inflight: int = 16  # images that advance by turns on this device, not those that wait
    max_batch_rows: int = 16  # rows of one forward; a guided image takes two
    max_encodes_per_turn: int = 4  # prompts encoded between two denoise steps, so that newcomers never stall the others for long
    conditioning_cache_bytes: int = 256 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class CheckpointSpec:
    """One checkpoint folder and what may be asked of it."""

    name: str
    path: str
    family: str = "sd"
    precision: str = "fp32"  # "fp32", "bf16" or "fp16"
    sha256: Mapping[str, str] = field(default_factory=dict)  # "unet/config.json" -> hex digest; {} trusts the folder
    sizes: tuple[tuple[int, int], ...]  # (width_px, height_px) that may be asked for
    samplers: tuple[str, ...]
    default_sampler: str | None = None  # renders the warm-up images; None: the first of `samplers`
