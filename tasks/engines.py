"""Make an engine's configuration from fleet.toml: its checkpoints, and what each accepts."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from engine.config import AdapterSpec, CheckpointSpec, EngineConfig
from engine.errors import CheckpointCorrupt, LoadFailure, LoadProblem, UnsupportedRequest
from engine.loading import expected_weights_bytes
from policy.fleet import Fleet, Model, ModelVersion, Pool, checkpoint_name, parse_size
from policy.residency import GB, ResidencyRule, problems_on_a_cpu, rule_of
from policy.sources import remote_source
from settings import DeviceSettings, WorkerSettings
from tasks.weights import Places, Weights, wanted_of

# Of one image, while somebody looks. A preview takes a millisecond, and quick images get some, too.
PREVIEWS_PER_S = 10.0
# What helps when a version of a model cannot be loaded.
_WAY_OUT = {
    LoadProblem.FILES: "fetch its files again, or correct source and sha256 of this version",
    LoadProblem.ABSENT: "mend that, or correct source and sha256 of this version",
    LoadProblem.SETTINGS: "correct this model in fleet.toml",
    LoadProblem.MEMORY: "put it into a pool of its own, or use a device with more memory",
    LoadProblem.UNPLANNED: "the traceback is in the worker's log, at checkpoint_not_loaded",
}


def checkpoint_specs(
    fleet: Fleet, names: Iterable[str], root: Path, cache: Path | None = None
) -> list[CheckpointSpec]:
    """List the versions of these models, in the file's order; nothing is fetched.

    names: of models, each with all its versions, or of single versions ("sdxl@v2").  root, cache:
    of relative paths, and of what is fetched.
    """
    wanted = set(names)
    places = Places(root, cache)
    return [
        _checkpoint_spec(fleet, name, model.of_version(version.id), version, places)
        for name, model in fleet.models.items()
        for version in model.versions
        if wanted & {name, checkpoint_name(name, version.id)}
    ]


def staged_specs(
    fleet: Fleet, names: Iterable[str], settings: DeviceSettings, weights: Weights
) -> list[CheckpointSpec]:
    """List the versions of these models as `checkpoint_specs` does, with all files fetched.

    Those whose files cannot be fetched say so.
    """
    specs = checkpoint_specs(fleet, names, settings.checkpoint_root, settings.model_cache_dir)
    absent = weights.stage(wanted_of(fleet, [spec.name for spec in specs]))
    return [replace(spec, absent=absent.get(spec.name, "")) for spec in specs]


def _checkpoint_spec(
    fleet: Fleet, name: str, model: Model, version: ModelVersion, places: Places
) -> CheckpointSpec:
    return CheckpointSpec(
        name=checkpoint_name(name, version.id),
        path=str(places.folder_of(version)),
        family=model.family,
        precision=model.precision,
        quantize=version.quantize,
        sha256=version.sha256,
        sizes=tuple(parse_size(size) for size in model.sizes),
        samplers=model.samplers,
        default_sampler=model.default_sampler,
        pinned_rows=_pinned_rows(fleet, model),
        adapters=tuple(
            AdapterSpec(name=each, path=str(places.file_of(adapter)), sha256=adapter.sha256)
            for each, adapter in model.adapters.items()
        ),
        adapter_slots=model.adapter_slots,
        max_adapter_rank=model.max_adapter_rank,
        pipeline_class=model.pipeline_class,
        options=model.options,
        channels_last=model.channels_last,
        vae_tf32=model.vae_tf32,
        compile_blocks=model.compile_blocks,
        cuda_graphs=model.cuda_graphs,
        block_cache_threshold=model.block_cache_threshold,
        guidance_distilled=model.guidance_distilled if model.family == "flux" else None,
    )


def _pinned_rows(fleet: Fleet, model: Model) -> dict[tuple[int, int], tuple[int, ...]]:
    """Give the rows of a forward of reproducible requests, of all tiers, by size."""
    pinned: dict[tuple[int, int], set[int]] = {}
    for tier, own in model.tiers.items():
        if fleet.tiers[tier].determinism == "reproducible":
            for size, rows in own.bucket_rows.items():
                pinned.setdefault(parse_size(size), set()).add(rows)
    return {size: tuple(sorted(rows)) for size, rows in pinned.items()}


def failure_sentence(fleet: Fleet, failure: LoadFailure, root: Path) -> str:
    """Say which version of which model cannot be loaded, from where, why, and what helps.

    A newer fleet than the one that it was loaded by may lack it: then by its name alone.
    """
    named = f"model {failure.checkpoint!r}"
    for model, entry in fleet.models.items():
        for version in entry.versions:
            if checkpoint_name(model, version.id) == failure.checkpoint:
                is_remote = remote_source(version.source) is not None
                place = version.source if is_remote else root / version.source
                named = f"model {model!r}, version {version.id!r} ({place})"
    return (
        f"{named} cannot be loaded: "
        f"{failure.problem}; {_WAY_OUT[failure.kind]}, then start the worker again"
    )


def engine_config(
    settings: DeviceSettings,
    fleet: Fleet,
    pool: Pool,
    *,
    warm_up_repeats: int = 1,
    may_lack_checkpoints: bool = False,
) -> EngineConfig:
    """Make the engine's configuration for a pool.

    may_lack_checkpoints: it starts without those that cannot be loaded.
    """
    return EngineConfig(
        device=chosen_device(settings),
        num_threads=settings.torch_threads,
        max_inflight=pool.slots,
        max_batch_rows=pool.max_batch_rows,
        row_buckets=pool.row_buckets,
        rank_shares=_rank_shares(fleet),
        attention=pool.attention,
        fp16_accumulation=pool.fp16_accumulation,
        blas_workspaces=(settings.cublas_workspace_config, settings.cublaslt_workspace_size),
        weights_room_bytes=residency_rule(settings, pool).device_bytes or 0,
        host_copy_bytes=int(pool.host_memory_gb * GB),
        curves_folder=str(settings.curves_folder or ""),
        warm_up_repeats=warm_up_repeats,
        previews_per_s=PREVIEWS_PER_S,
        may_lack_checkpoints=may_lack_checkpoints,
    )


def chosen_device(settings: DeviceSettings) -> str:
    """Return torch's name of the device that an engine runs on."""
    if settings.device != "auto":
        return settings.device
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def device_name(settings: DeviceSettings) -> str:
    """Return the name of the device as its maker calls it; "cpu" for the CPU."""
    device = chosen_device(settings)
    return device if device == "cpu" else torch.cuda.get_device_name(device)


def pool_of(settings: WorkerSettings, fleet: Fleet) -> Pool:
    """Return the worker's pool as its capacity class has it. Raises KeyError if it is gone."""
    pool = fleet.pools[settings.worker_pool]
    return pool.of_class(pool.class_of(settings.worker_class))


def residency_rule(settings: DeviceSettings, pool: Pool) -> ResidencyRule:
    """Tell how much of the pool's weights this device holds at once."""
    device = chosen_device(settings)
    gpu_bytes = 0
    if device != "cpu" and pool.residency == "lru":
        gpu_bytes = torch.cuda.get_device_properties(device).total_memory
    return rule_of(pool, gpu_bytes=gpu_bytes)


def device_misfits(settings: WorkerSettings, fleet: Fleet) -> list[str]:
    """Describe what fleet.toml asks of the worker's pool that its device cannot do."""
    pool = fleet.pools.get(settings.worker_pool)
    if pool is None or chosen_device(settings) != "cpu":
        return []
    return problems_on_a_cpu(settings.worker_pool, pool)


def sizes_of(specs: Iterable[CheckpointSpec]) -> dict[str, int]:
    """Tell the bytes of each checkpoint's weights; without those whose files cannot be read.

    Why they cannot, their load says.
    """
    sizes = {}
    for spec in specs:
        with suppress(CheckpointCorrupt, UnsupportedRequest):
            sizes[spec.name] = expected_weights_bytes(spec)
    return sizes


def _rank_shares(fleet: Fleet) -> dict[int, float]:
    """Give each rank's share of the device's time: its tier's guaranteed share of slots."""
    tiers = fleet.tiers.values()
    return {tier.rank: tier.guaranteed_share for tier in tiers if tier.guaranteed_share}
