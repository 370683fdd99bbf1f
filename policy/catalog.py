"""Resolve the parameters of a request to complete parameters, before anything is written.

Pure: no clock, no randomness of its own (the caller hands a seed and a draw), so a resolved job can
be replayed from its row.
"""

import math
from collections.abc import Collection
from typing import Any, TypeVar

from policy import capabilities
from policy.capabilities import Capabilities, Known
from policy.fleet import OPEN_FAMILIES, Family, Fleet, Model, ModelTier, ModelVersion, parse_size
from policy.params import PARAMS, PassThrough, RequestedParams, Resolved
from policy.refusals import InvalidParam, one_of, within

MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps exact
RANDOM_SEED = -1  # what other programs send for a seed that is drawn
# Native families: without a mask; with one it is 1: the masked part is painted anew.
DEFAULT_STRENGTH = 0.8
MAX_ADAPTERS = 8
# Of flow matching: they cannot mix a picture with noise. tests/engine/test_door.py compares.
FLOW_FAMILIES: tuple[Family, ...] = ("sd3", "flux")
NOISE_ONLY_SAMPLERS = ("flow_dpmpp_2m", "flow_unipc")
MAX_ADAPTER_STRENGTH = 4.0

Value = TypeVar("Value")


def resolve(
    fleet: Fleet,
    requested: RequestedParams,
    *,
    default_seed: int,
    draw: float,
    known: Known | None = None,
    usable_models: Collection[str] | None = None,
) -> Resolved:
    """Fill in what was not said and refuse what cannot be served.

    default_seed: used when the request names none.  draw: in [0, 1), picks the model version by
    traffic weight.  known: what checkpoints can do, of those that a worker has loaded.
    usable_models: ids of the models that a refusal may name; None: all.  Raises InvalidParam, which
    names the field.
    """
    job = _by_catalogue(fleet, requested, default_seed, draw, usable_models)
    model = fleet.models[job.model]
    able = capabilities_of(known or {}, model, job)
    if able is not None:
        max_batch_rows = fleet.pools[job.pool].max_batch_rows
        capabilities.check_fits(able, model, job, max_batch_rows=max_batch_rows)
    return job


def capabilities_of(known: Known, model: Model, job: Resolved) -> Capabilities | None:
    """Find what the job's checkpoint can do; None if no worker has loaded it yet."""
    checkpoint = checkpoint_name(job.model, job.model_version)
    return capabilities.of_version(known, checkpoint, model)


def _by_catalogue(
    fleet: Fleet,
    requested: RequestedParams,
    default_seed: int,
    draw: float,
    usable_models: Collection[str] | None,
) -> Resolved:
    """Resolve by the catalogue alone."""
    model_name = _first(requested.model, fleet.default_model())
    if model_name not in fleet.model_ids:
        one_of("model", model_name, _usable_names(fleet, usable_models))
    model_id = fleet.model_ids[model_name]
    tier_id = one_of("tier", _first(requested.tier, fleet.default_tier()), tuple(fleet.tiers))
    model = fleet.models[model_id]
    tier = fleet.tiers[tier_id]
    own = model.tiers.get(tier_id, ModelTier())
    _check_text(model, requested)
    sizes = fleet.sizes_of(model_id, tier_id)
    size = one_of("size", _first(requested.size, sizes[0]), sizes)
    width_px, height_px = parse_size(size)
    num_images = within("n", requested.n, 1, tier.max_images, f"tier {tier_id}")
    steps = _first(requested.steps, fleet.default_steps(model_id, tier_id))
    guidance = _first(requested.guidance, own.default_guidance, model.default_guidance)
    sampler = one_of("sampler", _first(requested.sampler, model.default_sampler), model.samplers)
    _check_sampler_fits(sampler, model, requested)
    version = pick_version(model, draw).id
    return Resolved(
        model=model_id,
        model_alias=model_name if model_name != model_id else None,
        model_version=version,
        pool=fleet.pool_of(model_id),
        tier=tier_id,
        width_px=width_px,
        height_px=height_px,
        num_steps=within("steps", steps, 1, tier.max_steps, f"tier {tier_id}"),
        guidance=within("guidance", guidance, 0.0, model.max_guidance, f"model {model_id}"),
        sampler=sampler,
        seed=_seed(requested, default_seed, num_images),
        num_images=num_images,
        **_passed_through(model, model_id, requested),
        strength=_strength(model, requested, steps),
        adapters=_adapters(model, model_id, requested),
        precision=model.of_version(version).precision,
        determinism=tier.determinism,
        bucket_rows=own.bucket_rows[size] if tier.determinism == "reproducible" else None,
    )


def _usable_names(fleet: Fleet, usable_models: Collection[str] | None) -> tuple[str, ...]:
    """List the names of models that a tenant may use."""
    return tuple(
        name
        for name, model_id in fleet.model_ids.items()
        if usable_models is None or model_id in usable_models
    )


def pick_version(model: Model, draw: float) -> ModelVersion:
    """Pick the version that `draw` in [0, 1) falls on, by traffic weight."""
    offered = [version for version in model.versions if version.traffic_weight > 0]
    point = draw * sum(version.traffic_weight for version in offered)
    for version in offered:
        point -= version.traffic_weight
        if point < 0:
            return version
    return offered[-1]


def checkpoint_name(model: str, version: str) -> str:
    """Name the weights of one version as the engine does."""
    return f"{model}@{version}"


def _check_text(model: Model, requested: RequestedParams) -> None:
    for field, text in (
        ("prompt", requested.prompt),
        ("negative_prompt", requested.negative_prompt),
    ):
        if len(text) > model.max_prompt_chars:
            most = model.max_prompt_chars
            detail = f"has {len(text)} characters; at most {most} are accepted"
            raise InvalidParam(field, detail, {"max_chars": most})
        if "\x00" in text or not _is_unicode(text):
            detail = "contains a NUL character or an unpaired surrogate; send plain Unicode text"
            raise InvalidParam(field, detail)
    if not requested.prompt.strip() and requested.init_image is None:  # a picture may say it all
        raise InvalidParam("prompt", "is empty; describe the image", {"min_chars": 1})


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def _check_sampler_fits(sampler: str, model: Model, requested: RequestedParams) -> None:
    if requested.init_image is None or model.family not in FLOW_FAMILIES:
        return
    if sampler in NOISE_ONLY_SAMPLERS:
        able = [name for name in model.samplers if name not in NOISE_ONLY_SAMPLERS]
        detail = f"{sampler!r} cannot start from an init_image; accepted: {', '.join(able)}"
        raise InvalidParam("sampler", detail, able)


def _seed(requested: RequestedParams, default_seed: int, num_images: int) -> int:
    """Return the seed of image 0; RANDOM_SEED stands for one that is drawn."""
    seed = (
        default_seed if requested.seed is None or requested.seed == RANDOM_SEED else requested.seed
    )
    most = MAX_SEED - num_images
    if not 0 <= seed <= most:
        detail = f"must be from 0 to {most}, or {RANDOM_SEED} for a random one"
        raise InvalidParam("seed", detail, {"min": RANDOM_SEED, "max": most})
    return seed


def _strength(model: Model, requested: RequestedParams, num_steps: int) -> float | None:
    """Return how far from the picture that it starts with a job goes.

    None without a picture, and where it is left to a pipeline's own call, which may know of none.
    """
    if requested.init_image is None:
        for field, said in (("mask", requested.mask), ("strength", requested.strength)):
            if said is not None:
                raise InvalidParam(field, "needs an init_image")
        return None
    if requested.strength is None and model.family in OPEN_FAMILIES:
        return None
    strength = _first(requested.strength, DEFAULT_STRENGTH if requested.mask is None else 1.0)
    least = math.ceil(10_000 / num_steps) / 10_000  # below that no step is left
    return within("strength", strength, least, 1.0, f"{num_steps} steps")


def _passed_through(model: Model, model_id: str, requested: RequestedParams) -> dict[str, Any]:
    """Return the parameters that are taken from the request as they are. Raises InvalidParam."""
    taken = {}
    for param in PARAMS:
        if param.pass_through is not None and param.member is not None:
            value = getattr(requested, param.member)
            if value is not None:
                _check_rule(param.member, param.pass_through, value, model, model_id)
            taken[param.name] = value
    return taken


def _check_rule(field: str, rule: PassThrough, value: Any, model: Model, model_id: str) -> None:
    if rule.families is not None and model.family not in rule.families:
        raise InvalidParam(field, rule.unfit.format(model=model_id))
    if rule.choices is not None:
        one_of(field, value, rule.choices)
    _check_range(field, value, rule.low, rule.high)


def _check_range(field: str, value: Any, low: float | None, high: float | None) -> None:
    """Refuse what is outside; None: that side has no end."""
    by = "every model that takes it"
    if low is not None and high is not None:
        within(field, value, low, high, by)
    elif low is not None and not value >= low:
        raise InvalidParam(field, f"must be at least {low} ({by})", {"min": low})
    elif high is not None and not value <= high:
        raise InvalidParam(field, f"must be at most {high} ({by})", {"max": high})


def _adapters(
    model: Model, model_id: str, requested: RequestedParams
) -> list[dict[str, str | float]] | None:
    if len(requested.adapters) > MAX_ADAPTERS:
        detail = f"has {len(requested.adapters)} entries; at most {MAX_ADAPTERS} are accepted"
        raise InvalidParam("adapters", detail, {"max": MAX_ADAPTERS})
    names = [adapter.name for adapter in requested.adapters]
    for place, adapter in enumerate(requested.adapters):
        if not model.adapters:
            raise InvalidParam("adapters", f"are not offered by model {model_id}", [])
        one_of(f"adapters/{place}/name", adapter.name, tuple(model.adapters))
        if adapter.name in names[:place]:
            left = [name for name in model.adapters if name not in names]
            detail = f"names {adapter.name!r} again; each adapter is accepted once"
            raise InvalidParam(f"adapters/{place}/name", detail, left)
        field = f"adapters/{place}/strength"
        most = MAX_ADAPTER_STRENGTH
        within(field, adapter.strength, -most, most, "every adapter")
    chosen: list[dict[str, str | float]] = [
        {"name": adapter.name, "strength": adapter.strength} for adapter in requested.adapters
    ]
    return chosen or None


def _first(*options: Value | None) -> Value:
    return next(option for option in options if option is not None)
