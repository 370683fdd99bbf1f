"""The settings of an engine: the device and its limits, and the checkpoints it holds.

Plain values. Whoever reads the environment or the catalog turns them into these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.request import Option


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One device and how much of it to use."""

    device: str = "cpu"  # "cpu" or "cuda:0"
    # "flash", "efficient", "cudnn" or "math": pin one of torch's kernels, the plain one where it
    # cannot.
    attention: str = "auto"
    # Half precision's matrix products are summed in half precision too: quicker on some GPUs.
    fp16_accumulation: bool = False
    # CUBLAS_WORKSPACE_CONFIG and CUBLASLT_WORKSPACE_SIZE, as this process has them.
    blas_workspaces: tuple[str, str] = ("", "")
    # Torch threads on a CPU; never more than free cores. Part of the fingerprint.
    num_threads: int = 1
    max_inflight: int = 16  # images that advance by turns on this device, not those that wait
    # Rank -> part of the device it gets at least while it has work.
    rank_shares: Mapping[int, float] = field(default_factory=dict)
    # Busy seconds that such a rank waits: shorter work of a better rank is never held up.
    share_patience_s: float = 2.0
    max_batch_rows: int = 16  # rows of one forward; a guided image takes two
    # A forward grows while one more row costs less than this share of a single-row step.
    growth_ceiling: float = 0.85
    # Sizes of best-effort forwards, padded up; (): exactly the rows there are; None: as suits the
    # device.
    row_buckets: tuple[int, ...] | None = None
    max_encodes_between_steps: int = 4  # so that newcomers never stall the others for long
    conditioning_cache_bytes: int = 256 * 1024 * 1024
    latent_cache_bytes: int = 64 * 1024 * 1024  # latents kept for forks
    # Device memory that images leave to weights, also while fewer are loaded: or a load that comes
    # while they run would find none.
    weights_room_bytes: int = 0
    # Host memory for copies of weights that left the device and may return.
    host_copy_bytes: int = 0
    warm_up_repeats: int = 1  # measurements of each bucket of which no curve is known
    previews_per_s: float = 2.0  # of one image, at most
    # What `./darkroom calibrate` measured; "": everything is measured at warm-up.
    curves_folder: str = ""
    # Start with those checkpoints that can be loaded, as long as there is one.
    may_lack_checkpoints: bool = False

    @property
    def buckets(self) -> tuple[int, ...]:
        """Give `row_buckets`; where nobody says, doublings on a GPU and none on a CPU.

        The first forward of a row count costs a GPU up to seconds, for kernels are chosen then. A
        few counts are tried before the first request; a CPU would only compute more zeros.
        """
        if self.row_buckets is not None:
            return self.row_buckets
        return () if self.device == "cpu" else doublings(self.max_batch_rows)


def doublings(most: int) -> tuple[int, ...]:
    """Return 1, 2, 4 … and `most` itself."""
    powers = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return (*powers, most)


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """Low-rank weights that may be laid over a checkpoint: one safetensors file."""

    name: str
    path: str
    sha256: str = ""  # "" trusts the file


@dataclass(frozen=True, kw_only=True)
class CheckpointSpec:
    """One checkpoint folder and what may be asked of it."""

    name: str
    path: str
    family: str = "sd"
    precision: str = "fp32"  # "fp32", "bf16" or "fp16"
    quantize: str | None = None  # "int8" or "float8": weights of linear layers
    # "unet/config.json" -> hex digest; {} trusts the folder.
    sha256: Mapping[str, str] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...]  # (width_px, height_px) that may be asked for
    samplers: tuple[str, ...]
    default_sampler: str | None = None  # renders the warm-up images; None: the first of `samplers`
    # Size -> `bucket_rows` that requests will have, for the warm-up. Nothing else goes by it, so
    # two that differ in it are the same checkpoint.
    pinned_rows: Mapping[tuple[int, int], tuple[int, ...]] = field(
        default_factory=dict, compare=False
    )
    adapters: tuple[AdapterSpec, ...] = ()
    adapter_slots: int = 8  # different adapters in one forward
    max_adapter_rank: int = 64
    # Family "pipeline": the diffusers class; "": what the checkpoint's model_index.json names.
    pipeline_class: str = ""
    # Family "pipeline": arguments of every call.
    options: Mapping[str, Option] = field(default_factory=dict)
    # The UNet's weights in the layout that convolutions in half precision like.
    channels_last: bool = False
    # Family sdxl in half precision on a GPU: where its VAE is upcast to float32, TF32 may be used.
    vae_tf32: bool = True
    # torch.compile, block by block: a minute at the first start, a tenth or more off each step.
    compile_blocks: bool = False
    # Record each bucket's forward once; with `row_buckets`, so that there are few.
    cuda_graphs: bool = False
    # A best-effort image skips the other blocks when the first block's residual changed relatively
    # by less than this; 0: no cache.
    block_cache_threshold: float = 0.0
    block_cache_bytes: int = 1024 * 1024 * 1024
    # Of a flux network: whether it takes guidance as an input; None: nobody says.
    guidance_distilled: bool | None = None
    # Why its files could not be brought to `path`: it cannot be loaded. "": they are there.
    absent: str = ""
