"""What a key may ask for: what is offered is accepted, and what is accepted is offered."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from policy.catalog import resolve
from policy.fleet import FleetInvalid
from policy.offers import offer_of, offered_models, offered_names, offered_pools, offered_tiers
from policy.refusals import InvalidParam
from policy.routing import Asker
from tests.builders import a_fleet, some_params

VERSIONS = ("1", "2", "next")
TIERS = ("fast", "quality", "batch")
TENANTS = ("acme", "globex")
SHAPE = {"slots": 8, "max_batch_rows": 8}


def some_of(values, **sizes):
    return st.lists(st.sampled_from(values), unique=True, **sizes)


pools = st.fixed_dictionaries(
    {
        "models": some_of(["large", "pocket", *(f"pocket@{v}" for v in VERSIONS)], min_size=1),
        "tenants": some_of(TENANTS),
        "tiers": some_of(TIERS),
    }
)
askers = st.builds(
    Asker,
    tenant=st.sampled_from([*TENANTS, "other"]),
    models=st.none() | some_of(["pocket", "large"], min_size=1),
    tiers=st.none() | some_of(TIERS, min_size=1),
    may_name_versions=st.booleans(),
)


@st.composite
def fleets(draw):
    own = draw(st.none() | st.sampled_from(VERSIONS))
    changes = {
        "models.pocket.aliases": ["dall-e-3"],
        "models.pocket.versions": [
            {"id": version, "source": version, "traffic_weight": draw(st.sampled_from([0.0, 1.0]))}
            for version in VERSIONS
        ],
        "models.pocket.tiers.fast": {"version": own} if own else {},
        "pools": {f"pool-{n}": SHAPE | draw(pools) for n in range(draw(st.integers(1, 3)))},
    }
    try:
        return a_fleet(changes)
    except FleetInvalid:
        assume(False)


def accepted(fleet, asker, **asked):
    """The job; None if it is refused, also by the tenant's limits."""
    try:
        job = resolve(fleet, some_params(**asked), default_seed=7, asker=asker)
    except InvalidParam:
        return None
    is_allowed = asker.may_use_model(job.model) and asker.may_use_tier(job.tier)
    return job if is_allowed else None


@given(fleet=fleets(), asker=askers)
def test_a_name_is_offered_exactly_if_a_request_with_it_is_accepted(fleet, asker):
    versions = [f"{name}@{version}" for name in fleet.model_ids for version in VERSIONS]
    offered = offered_names(fleet, asker)

    for name in [*fleet.model_ids, *offered]:
        assert (name in offered) == (accepted(fleet, asker, model=name) is not None)
    for name in versions:
        model, _, version = name.partition("@")
        offer = offer_of(fleet, fleet.model_ids[model], asker)
        may = asker.may_name_versions and version in offer.versions
        assert may == (accepted(fleet, asker, model=name) is not None)


@given(fleet=fleets(), asker=askers)
def test_a_tier_is_offered_exactly_if_a_request_in_it_is_accepted(fleet, asker):
    for model in fleet.models:
        offer = offer_of(fleet, model, asker)
        for tier in TIERS:
            job = accepted(fleet, asker, model=model, tier=tier)
            assert (tier in offer.tiers) == (job is not None)
            if job is not None:
                assert job.model_version in offer.versions
                assert job.pool in offered_pools(fleet, model, asker)
                assert tier in offered_tiers(fleet, asker)


@given(fleet=fleets(), asker=askers)
def test_a_request_that_names_nothing_gets_what_is_offered(fleet, asker):
    job = accepted(fleet, asker)

    assert (job is not None) == bool(offered_names(fleet, asker))
    if job is not None:
        assert job.model in offered_models(fleet, asker)


@given(fleet=fleets(), asker=askers, asked=st.sampled_from(["no-such", "pocket@no-such", "large"]))
def test_a_refusal_names_only_what_would_be_accepted(fleet, asker, asked):
    for request in ({"model": asked}, {"tier": "no-such"}, {"model": asked, "tier": "fast"}):
        try:
            resolve(fleet, some_params(**request), default_seed=7, asker=asker)
        except InvalidParam as refused:
            for value in refused.accepted:
                again = request | {refused.field: value}
                assume("tier" not in again or refused.field == "tier")
                is_accepted = accepted(fleet, asker, **again) is not None
                within = asker.models is None or asked in asker.models or "model" not in again
                assert is_accepted or not within


def test_a_tier_that_only_weightless_versions_have_takes_requests_that_name_one():
    versions = [{"id": "1", "source": "a"}, {"id": "next", "source": "b", "traffic_weight": 0.0}]
    pool = SHAPE | {"models": ["pocket@next"], "tiers": ["batch"]}
    local = SHAPE | {"models": ["pocket@1"], "tiers": ["fast"]}
    changes = {"models.pocket.versions": versions, "pools.local": local, "pools.trial": pool}
    fleet = a_fleet(changes)
    asker = Asker(may_name_versions=True)

    assert offer_of(fleet, "pocket", asker).tiers == ("fast",)
    job = resolve(fleet, some_params(model="pocket@next"), default_seed=7, asker=asker)
    assert (job.tier, job.pool) == ("batch", "trial")
    with pytest.raises(InvalidParam) as refused:
        resolve(fleet, some_params(model="pocket", tier="batch"), default_seed=7, asker=asker)
    assert (refused.value.field, refused.value.accepted) == ("tier", ["fast"])


def test_a_tier_whose_version_no_pool_renders_in_it_is_refused_with_what_would_do():
    versions = [{"id": "1", "source": "a"}, {"id": "2", "source": "b"}]
    changes = {
        "models.pocket.versions": versions,
        "models.pocket.tiers.fast": {"version": "2"},
        "pools.local.models": ["pocket@1"],
        "pools.bulk": SHAPE | {"models": ["pocket@2"], "tiers": ["batch"]},
    }

    with pytest.raises(FleetInvalid) as refused:
        a_fleet(changes)

    [problem] = refused.value.problems
    assert problem == (
        "models.pocket.tiers.fast.version: no pool renders '2' in tier fast, so nobody could use"
        " it; accepted: 1"
    )


def test_a_tier_whose_version_a_reserved_pool_has_is_offered_to_its_tenants_alone():
    versions = [{"id": "1", "source": "a"}, {"id": "2", "source": "b"}]
    changes = {
        "models.pocket.versions": versions,
        "models.pocket.tiers.fast": {"version": "2"},
        "pools.local.models": ["pocket@1"],
        "pools.acme": SHAPE | {"models": ["pocket@2"], "tenants": ["acme"]},
    }
    fleet = a_fleet(changes)

    assert offer_of(fleet, "pocket", Asker(tenant="acme")).tiers == TIERS
    assert offer_of(fleet, "pocket", Asker(tenant="other")).tiers == ("quality", "batch")
    assert accepted(fleet, Asker(tenant="other"), model="pocket").tier == "quality"
