"""Say what a tenant's key may ask for: models, their versions, and the tiers of each.

Pure. Every door asks here: what is listed or told in a refusal is accepted. A model, version or
tier whose pools are all reserved for other tenants is not named to this one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from policy.fleet import VERSION_MARK, Fleet, checkpoint_name
from policy.refusals import InvalidParam, one_of
from policy.routing import Asker, pools_for, tiers_for


@dataclass(frozen=True)
class Offer:
    """What a key may ask of one model.

    tiers: of requests that name no version.  versions: by id, the tiers in which each may render.
    """

    tiers: tuple[str, ...]
    versions: Mapping[str, tuple[str, ...]]


def offer_of(fleet: Fleet, model: str, asker: Asker) -> Offer:
    """Say what the key may ask of a model of the file."""
    if not asker.may_use_model(model):
        return Offer((), {})
    tiers = {
        version: tiers_offered(fleet, model, asker, version=version)
        for version in fleet.models[model].as_served
    }
    offered = {version: able for version, able in tiers.items() if able}
    return Offer(tiers_offered(fleet, model, asker), offered)


def tiers_offered(
    fleet: Fleet, model: str, asker: Asker, *, version: str | None = None
) -> tuple[str, ...]:
    """List the tiers that the key may use and that serve the model, or one version of it."""
    served = tiers_for(fleet, model=model, tenant=asker.tenant, version=version)
    return tuple(tier for tier in served if asker.may_use_tier(tier))


def offered_names(fleet: Fleet, asker: Asker) -> tuple[str, ...]:
    """List what a request of this key may say as its model: ids, then aliases.

    Of a model that it can only have by version, the names of these versions.
    """
    return tuple(_names(fleet, asker))


def _names(fleet: Fleet, asker: Asker) -> Iterator[str]:
    offers: dict[str, Offer] = {}
    for name, model in fleet.model_ids.items():
        if model not in offers:
            offers[model] = offer_of(fleet, model, asker)
        offer = offers[model]
        if offer.tiers:
            yield name
        elif asker.may_name_versions:
            yield from (checkpoint_name(name, version) for version in offer.versions)


def offered_models(fleet: Fleet, asker: Asker) -> tuple[str, ...]:
    """List the ids of the models of `offered_names`."""
    named = (split_name(fleet, name)[0] for name in offered_names(fleet, asker))
    return tuple(dict.fromkeys(fleet.model_ids[name] for name in named))


def offered_tiers(fleet: Fleet, asker: Asker) -> tuple[str, ...]:
    """List the tiers in which some model is offered, in the order of the file."""
    offers = [offer_of(fleet, model, asker) for model in offered_models(fleet, asker)]
    offered = {tier for offer in offers for tier in offer.tiers}
    if asker.may_name_versions:
        offered |= {tier for offer in offers for able in offer.versions.values() for tier in able}
    return tuple(tier for tier in fleet.tiers if tier in offered)


def offered_pools(fleet: Fleet, model: str, asker: Asker) -> tuple[str, ...]:
    """List the pools that may render the model for this key, in the order of the file."""
    able = {
        pool
        for version, tiers in offer_of(fleet, model, asker).versions.items()
        for tier in tiers
        for pool in pools_for(fleet, model=model, version=version, tier=tier, tenant=asker.tenant)
    }
    return tuple(pool for pool in fleet.pools if pool in able)


def split_name(fleet: Fleet, said: str) -> tuple[str, str | None]:
    """Split "sdxl@v2" into model and version; an alias may have the mark in it."""
    name, mark, version = said.rpartition(VERSION_MARK)
    return (name, version) if mark and said not in fleet.model_ids else (said, None)


def find_model(fleet: Fleet, said: str | None, asker: Asker) -> tuple[str, str | None]:
    """Return the name of the model, as it was asked for, and the version that was named with it.

    said: None for the first that is offered: what is reserved for others is nobody's default.
    Raises InvalidParam.  What the tenant's limits forbid is found: that is another refusal.
    """
    if said is None:
        said = next(_names(fleet, asker), fleet.default_model())
    name, version = split_name(fleet, said)
    model = fleet.model_ids.get(name)
    served = () if model is None else _versions_served(fleet, model, asker)
    if model is None or not served:
        raise _not_offered(fleet, said, asker)
    if version is not None and not asker.may_name_versions:
        offered = offered_names(fleet, asker)
        detail = (
            f"{said[:64]!r} names a version, which only a key with the scope `versions` may;"
            f" accepted: {', '.join(offered)}"
        )
        raise InvalidParam("model", detail, list(offered))
    if version is not None:
        one_of("model", said, tuple(checkpoint_name(name, each) for each in served))
    elif not tiers_for(fleet, model=model, tenant=asker.tenant):
        raise _not_offered(fleet, said, asker)
    return name, version


def _versions_served(fleet: Fleet, model: str, asker: Asker) -> tuple[str, ...]:
    return tuple(
        version
        for version in fleet.models[model].as_served
        if tiers_for(fleet, model=model, tenant=asker.tenant, version=version)
    )


def _not_offered(fleet: Fleet, said: str, asker: Asker) -> InvalidParam:
    offered = offered_names(fleet, asker)
    detail = f"{said[:64]!r} is not offered; accepted: {', '.join(offered)}"
    return InvalidParam("model", detail, list(offered))
