"""Which version of a model renders a job, and in which pool of workers it waits."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.catalog import resolve
from policy.fleet import FleetInvalid
from policy.refusals import InvalidParam
from policy.routing import Asker, LivePool, draw_version, overflow, pools_for
from tests.builders import a_fleet, some_params

TENANTS = [f"tenant-{number}" for number in range(1000)]
TWO_VERSIONS = {
    "models.pocket.versions": [
        {"id": "1", "source": "a", "traffic_weight": 9.0},
        {"id": "2", "source": "b", "traffic_weight": 1.0},
        {"id": "next", "source": "c", "traffic_weight": 0.0},
    ]
}


def a_pool(*models, **keys):
    return {"models": list(models), "slots": 8, "max_batch_rows": 8, **keys}


def chosen(fleet, *, model=None, tier=None, **asker):
    requested = some_params(model=model, tier=tier)
    return resolve(fleet, requested, default_seed=7, asker=Asker(**asker))


def looking(**pools):
    """The live workers of each pool; of those not named there are none."""
    return lambda pool: pools.get(pool, LivePool(0))


# --- versions -------------------------------------------------------------------------------------


def test_versions_get_tenants_by_their_weight():
    fleet = a_fleet(TWO_VERSIONS)

    drawn = Counter(chosen(fleet, tenant=tenant).model_version for tenant in TENANTS)

    assert drawn["next"] == 0
    assert 70 <= drawn["2"] <= 130


def test_a_tenant_keeps_its_version_while_the_weights_stand():
    fleet = a_fleet(TWO_VERSIONS)

    for tenant in TENANTS[:50]:
        assert len({chosen(fleet, tenant=tenant).model_version for _ in range(3)}) == 1


@given(
    weights=st.lists(st.sampled_from([1e-9, 0.1, 1.0, 3.0, 1e9]), min_size=2, max_size=5),
    tenant=st.text(max_size=5),
)
def test_a_version_that_is_taken_away_moves_only_its_own_tenants(weights, tenant):
    versions = [
        {"id": str(number), "source": "a", "traffic_weight": weight}
        for number, weight in enumerate(weights)
    ]
    offered = a_fleet({"models.pocket.versions": versions}).models["pocket"].versions

    drawn = draw_version(offered, model="pocket", tenant=tenant)

    for gone in offered:
        left = [version for version in offered if version != gone]
        after = draw_version(left, model="pocket", tenant=tenant)
        assert gone == drawn or after == drawn


def test_a_version_that_no_live_worker_serves_is_not_drawn_while_another_is():
    fleet = a_fleet(TWO_VERSIONS)
    broken_canary = looking(local=LivePool(1, {"pocket@1", "pocket@next"}))

    drawn = {chosen(fleet, tenant=tenant, live=broken_canary).model_version for tenant in TENANTS}

    assert drawn == {"1"}


def test_a_version_is_drawn_by_weight_where_no_worker_is_alive_at_all():
    fleet = a_fleet(TWO_VERSIONS)

    drawn = {chosen(fleet, tenant=tenant, live=looking()).model_version for tenant in TENANTS}

    assert drawn == {"1", "2"}


def test_a_key_that_may_names_a_version_also_one_without_traffic():
    fleet = a_fleet(TWO_VERSIONS | {"models.pocket.aliases": ["gpt-image-1"]})

    job = chosen(fleet, model="gpt-image-1@next", may_name_versions=True)

    assert (job.model, job.model_alias, job.model_version) == ("pocket", "gpt-image-1", "next")


@pytest.mark.parametrize(
    ("model", "may", "accepted"),
    [
        ("pocket@next", False, ["pocket", "large"]),
        ("pocket@gone", True, ["pocket@1", "pocket@2", "pocket@next"]),
        ("pockett@1", True, ["pocket", "large"]),
        ("pocket@", True, ["pocket@1", "pocket@2", "pocket@next"]),
        ("@", True, ["pocket", "large"]),
    ],
)
def test_a_version_that_cannot_be_named_is_refused_with_what_is_accepted(model, may, accepted):
    with pytest.raises(InvalidParam) as refused:
        chosen(a_fleet(TWO_VERSIONS), model=model, may_name_versions=may)

    assert (refused.value.field, refused.value.accepted) == ("model", accepted)


# --- pools ----------------------------------------------------------------------------------------

POOLS = {
    "pools.acme": a_pool("pocket", tenants=["acme"]),
    "pools.bulk": a_pool("pocket", tiers=["batch"]),
    "pools.canary": a_pool("pocket@2"),
    **TWO_VERSIONS,
}


@pytest.mark.parametrize(
    ("tenant", "tier", "version", "pools"),
    [
        ("acme", "fast", "1", ("acme", "local")),
        ("acme", "batch", "1", ("acme", "bulk", "local")),
        ("other", "fast", "1", ("local",)),
        ("other", "batch", "1", ("bulk", "local")),
        ("other", "fast", "2", ("local", "canary")),
    ],
)
def test_pools_of_a_job_are_the_reserved_ones_then_those_of_its_tier_then_the_others(
    tenant, tier, version, pools
):
    fleet = a_fleet(POOLS)

    found = pools_for(fleet, model="pocket", version=version, tier=tier, tenant=tenant)

    assert found == pools


def test_a_job_goes_to_the_first_of_its_pools_that_can_render_it():
    fleet = a_fleet(POOLS)
    everywhere = looking(acme=LivePool(1), local=LivePool(1), bulk=LivePool(1))
    acme_is_down = looking(local=LivePool(1))
    nobody_is_there = looking()

    for live, pool in [(everywhere, "acme"), (acme_is_down, "local"), (nobody_is_there, "acme")]:
        assert chosen(fleet, tenant="acme", tier="fast", live=live).pool == pool


def test_a_pool_that_is_scaled_up_for_waiting_jobs_is_as_good_as_a_live_one():
    fleet = a_fleet(POOLS | {"pools.acme": a_pool("pocket", tenants=["acme"], scalable=True)})

    assert chosen(fleet, tenant="acme", live=looking(local=LivePool(1))).pool == "acme"


@given(
    reserved=st.dictionaries(
        st.sampled_from(["a", "b", "c"]),
        st.lists(st.sampled_from(["acme", "globex"]), min_size=1, max_size=2, unique=True),
        max_size=3,
    ),
    tenant=st.sampled_from(["acme", "globex", "other", ""]),
    alive=st.sets(st.sampled_from(["a", "b", "c", "local"])),
)
def test_a_tenant_never_lands_in_a_pool_that_is_reserved_for_others(reserved, tenant, alive):
    fleet = a_fleet(
        {f"pools.{name}": a_pool("pocket", tenants=names) for name, names in reserved.items()}
        or None
    )
    live = looking(**dict.fromkeys(alive, LivePool(1)))

    pool = fleet.pools[chosen(fleet, tenant=tenant, live=live).pool]

    assert not pool.tenants or tenant in pool.tenants


def test_a_model_of_a_reserved_pool_alone_is_offered_to_its_tenants_alone():
    fleet = a_fleet({"pools.big": a_pool("large", tenants=["acme"])})

    assert chosen(fleet, model="large", tenant="acme").pool == "big"
    with pytest.raises(InvalidParam) as refused:
        chosen(fleet, model="large", tenant="other")

    assert (refused.value.field, refused.value.accepted) == ("model", ["pocket"])


def test_a_model_that_only_one_tier_s_pool_has_is_served_in_that_tier():
    fleet = a_fleet({"pools.big": a_pool("large", tiers=["batch"])})

    assert chosen(fleet, model="large").tier == "batch"
    with pytest.raises(InvalidParam) as refused:
        chosen(fleet, model="large", tier="fast")

    assert (refused.value.field, refused.value.accepted) == ("tier", ["batch"])


OVERFLOWING = POOLS | {
    "pools.local.overflow_to": "bulk",
    "pools.local.overflow_after_s": 20.0,
}


def test_a_pool_overflows_only_to_where_live_workers_serve_the_tier():
    fleet = a_fleet(OVERFLOWING)

    way = overflow(fleet, pool="local", tier="batch", live=LivePool(1, {"pocket@1"}))

    assert way is not None
    assert (way.pool, way.after_s, way.tenants) == ("bulk", 20.0, ())
    assert way.checkpoints == {"pocket@1"}
    assert overflow(fleet, pool="local", tier="fast", live=LivePool(1)) is None
    assert overflow(fleet, pool="local", tier="batch", live=LivePool(0)) is None
    assert overflow(fleet, pool="bulk", tier="batch", live=LivePool(1)) is None


@pytest.mark.parametrize(
    ("changes", "key", "sentence"),
    [
        ({"pools.local.tiers": ["gold"]}, "pools.local.tiers", "accepted: fast, quality, batch"),
        ({"pools.local.overflow_to": "bulk"}, "pools.local.overflow_to", "overflow_after_s"),
        (
            {"pools.local.overflow_to": "big", "pools.local.overflow_after_s": 1.0},
            "pools.local.overflow_to",
            "accepted: acme, bulk, canary",
        ),
        ({"pools.local.models": ["pocket@9"]}, "pools.local.models", "'pocket@9'"),
        (
            {"models.pocket.tiers.fast": {"version": "9"}},
            "models.pocket.tiers.fast.version",
            "accepted: 1, 2, next",
        ),
        (
            {"models.pocket.tiers.fast": {"default_sampler": "heun"}},
            "models.pocket.tiers.fast.default_sampler",
            "accepted: ddim, euler",
        ),
        (
            {"models.pocket.tiers.fast": {"adapters": [{"name": "ink"}]}},
            "models.pocket.tiers.fast.adapters",
            "accepted: none",
        ),
    ],
)
def test_a_route_or_variant_that_leads_nowhere_is_refused_with_what_is_accepted(
    changes, key, sentence
):
    with pytest.raises(FleetInvalid) as refused:
        a_fleet(POOLS | changes)

    [problem] = refused.value.problems
    assert problem.startswith(f"{key}: ")
    assert sentence in problem
