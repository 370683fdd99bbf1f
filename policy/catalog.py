"""Resolve the parameters of a request to complete parameters, before anything is written.

Pure: no clock, no randomness of its own (the caller hands a seed), so a resolved job can
be replayed from its row.
"""

import math
from typing import Any, TypeVar

from policy import capabilities
from policy.capabilities import Capabilities, Known
from policy.fleet import (
    MAX_ADAPTER_STRENGTH,
    MAX_ADAPTERS,
    OPEN_FAMILIES,
    Family,
    Fleet,
    Model,
    ModelTier,
    checkpoint_name,
    parse_size,
)
from policy.offers import find_model, tiers_offered
from policy.params import PARAMS, PassThrough, RequestedParams, Resolved
from policy.refusals import InvalidParam, one_of, within
from policy.routing import (
    ANYBODY,
    Asker,
    choose_pool,
    choose_version,
    pools_for,
    tiers_for,
    versions_for,
    versions_unnamed,
)

MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps exact
RANDOM_SEED = -1  # what other programs send for a seed that is drawn
# Native families: without a mask; with one it is 1: the masked part is painted anew.
DEFAULT_STRENGTH = 0.8
# Of flow matching: they cannot mix a picture with noise. tests/engine/test_door.py compares.
FLOW_FAMILIES: tuple[Family, ...] = ("sd3", "flux")
NOISE_ONLY_SAMPLERS = ("flow_dpmpp_2m", "flow_unipc")

Value = TypeVar("Value")


def resolve(
    fleet: Fleet,
    requested: RequestedParams,
    *,
    default_seed: int,
    asker: Asker = ANYBODY,
    known: Known | None = None,
) -> Resolved:
    """Fill in what was not said and refuse what cannot be served.

    default_seed: used when the request names none.  asker: who asks, by which version and pool are
    chosen.  known: what checkpoints can do, of those that a worker has loaded.  Raises
    InvalidParam, which names the field.
    """
    job = _by_catalogue(fleet, requested, default_seed, asker)
    model = fleet.models[job.model]
    able = capabilities_of(known or {}, model, job)
    if able is not None:
        max_batch_rows = fleet.pools[job.pool].max_batch_rows
        capabilities.check_fits(able, model, job, max_batch_rows=max_batch_rows)
    return job


def capabilities_of(known: Known, model: Model, job: Resolved) -> Capabilities | None:
    """Find what the job's checkpoint can do; None if no worker has loaded it yet."""
    checkpoint = checkpoint_name(job.model, job.model_version)
    return capabilities.of_version(known, checkpoint, model, job.model_version)


def _by_catalogue(
    fleet: Fleet, requested: RequestedParams, default_seed: int, asker: Asker
) -> Resolved:
    """Resolve by the catalogue alone."""
    model_name, named_version = find_model(fleet, requested.model, asker)
    model_id = fleet.model_ids[model_name]
    tier_id = _tier(fleet, requested, model_id, named_version, asker)
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
    default_sampler = _first(own.default_sampler, model.default_sampler)
    sampler = one_of("sampler", _first(requested.sampler, default_sampler), model.samplers)
    _check_sampler_fits(sampler, model, requested)
    version = _version(fleet, model_id, tier_id, named_version, asker)
    return Resolved(
        model=model_id,
        model_alias=model_name if model_name != model_id else None,
        model_version=version,
        pool=_pool(fleet, model_id, version, tier_id, asker),
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
        adapters=_adapters(model, model_id, own, requested),
        precision=model.of_version(version).precision,
        determinism=tier.determinism,
        bucket_rows=own.bucket_rows[size] if tier.determinism == "reproducible" else None,
    )


def _tier(
    fleet: Fleet, requested: RequestedParams, model: str, version: str | None, asker: Asker
) -> str:
    """Return the tier; by default the first in which the key may have the model."""
    served = tiers_for(fleet, model=model, tenant=asker.tenant, version=version)
    offered = tiers_offered(fleet, model, asker, version=version)
    if requested.tier is None:
        return next(iter(offered or served))
    if requested.tier not in served:
        what = model if version is None else checkpoint_name(model, version)
        detail = f"{requested.tier[:64]!r} is not offered with model {what}"
        raise InvalidParam("tier", f"{detail}; accepted: {', '.join(offered)}", list(offered))
    return requested.tier


def _version(fleet: Fleet, model: str, tier: str, named: str | None, asker: Asker) -> str:
    """Return the version that renders: the named one, or the tier's, or one that is drawn."""
    if named is not None:
        return named
    served = versions_for(fleet, model, tier, asker.tenant)
    able = versions_unnamed(fleet, model, tier, served)
    return choose_version(fleet, able, model=model, tier=tier, asker=asker).id


def _pool(fleet: Fleet, model: str, version: str, tier: str, asker: Asker) -> str:
    pools = pools_for(fleet, model=model, version=version, tier=tier, tenant=asker.tenant)
    return choose_pool(fleet, pools, checkpoint_name(model, version), asker)


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
    model: Model, model_id: str, own: ModelTier, requested: RequestedParams
) -> list[dict[str, str | float]] | None:
    """Return the adapters of the tier, and those that were asked for."""
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
    strengths = {adapter.name: adapter.strength for adapter in own.adapters}
    strengths |= {adapter.name: adapter.strength for adapter in requested.adapters}
    if len(strengths) > MAX_ADAPTERS:
        most = MAX_ADAPTERS - len(own.adapters)
        detail = f"has {len(names)} entries; at most {most} are accepted beside those of the tier"
        raise InvalidParam("adapters", detail, {"max": most})
    return [{"name": name, "strength": strengths[name]} for name in strengths] or None


def _first(*options: Value | None) -> Value:
    return next(option for option in options if option is not None)
