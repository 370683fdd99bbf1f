"""What differs between two fleets, what becomes of queued jobs, and one fleet for one request."""

import contextvars

import pytest

from policy.current import CurrentFleet, current
from policy.failures import FailureCode
from policy.revisions import Decision, Fate, QueuedKind, changes, decide, decide_again
from policy.routing import LivePool
from tests.builders import a_fleet

KIND = QueuedKind("local", "pocket", "1", "fast", "acme", 128, 128, "ddim")
MODEL_GONE = FailureCode.MODEL_GONE
LOST = FailureCode.NO_LONGER_OFFERED


def told(changed: dict) -> list[str]:
    return [str(change) for change in changes(a_fleet(), a_fleet(changed))]


def test_the_same_fleet_differs_in_nothing():
    assert told({}) == []


def test_a_changed_key_is_told_with_both_values():
    assert told({"tiers.fast.max_steps": 30}) == ["  tiers.fast.max_steps: 20 -> 30"]


def test_a_version_is_found_by_its_id_and_not_by_its_place():
    fleet = a_fleet()
    model = fleet.models["pocket"]
    second = model.versions[0].model_copy(update={"id": "2", "traffic_weight": 0.5})
    more = model.model_copy(update={"versions": (second, *model.versions)})
    new = fleet.model_copy(update={"models": {**fleet.models, "pocket": more}})

    assert [str(change) for change in changes(fleet, new)] == ["+ models.pocket.versions.2"]
    assert [str(change) for change in changes(new, fleet)] == ["- models.pocket.versions.2"]


@pytest.mark.parametrize(
    ("kind", "decided"),
    [
        (KIND, Decision(Fate.STAYS, "local")),
        (KIND._replace(tier="gone"), Decision(Fate.STAYS, "local")),
        (KIND._replace(pool="gone"), Decision(Fate.MOVES, "local")),
    ],
    ids=["nothing", "its tier", "its pool"],
)
def test_a_queued_job_is_made_wherever_a_pool_serves_its_version(kind, decided):
    assert decide(kind, a_fleet()) == decided


@pytest.mark.parametrize(
    ("kind", "code", "detail"),
    [
        (KIND._replace(model="gone"), MODEL_GONE, "model gone, version 1, is no longer offered"),
        (
            KIND._replace(model_version="0"),
            MODEL_GONE,
            "model pocket, version 0, is no longer offered",
        ),
        (KIND._replace(width_px=192), LOST, "size 192x128 of model pocket is no longer offered"),
        (KIND._replace(sampler="heun"), LOST, "sampler heun of model pocket is no longer offered"),
        (
            KIND._replace(adapters=("ink",), pool="gone"),
            LOST,
            "adapter ink of model pocket is no longer offered",
        ),
    ],
    ids=["its model", "its version", "its size", "its sampler", "an adapter, and its pool"],
)
def test_a_queued_job_fails_if_its_model_does_not_offer_what_it_names(kind, code, detail):
    assert decide(kind, a_fleet()) == Decision(Fate.FAILS, kind.pool, code, detail)


def test_a_job_is_made_again_where_a_new_one_would_be():
    acme = {"models": ["pocket"], "tenants": ["acme"], "slots": 16, "max_batch_rows": 16}
    fleet = a_fleet({"pools.acme": acme | {"warm_floor": 1}})
    live = {"local": LivePool(1), "acme": LivePool(1)}

    def decided(kind):
        return decide_again(kind, fleet, lambda pool: live[pool])

    assert decided(KIND).pool == "acme", "the pool of its tenant, which is new"
    live["acme"] = LivePool(0)
    assert decided(KIND).pool == "local", "where somebody serves it now"
    assert decided(KIND._replace(tenant="other", pool="gone")).pool == "local"
    assert decided(KIND._replace(sampler="heun")).code is LOST


def test_a_pinned_context_keeps_its_fleet_while_others_get_the_new_one():
    old = a_fleet()
    new = a_fleet({"tiers.fast.max_steps": 30})
    holder = CurrentFleet(old, 1)

    def within_a_request() -> tuple[object, int]:
        holder.pin()
        holder.replace(new, 2)
        return holder.fleet, holder.number

    assert contextvars.copy_context().run(within_a_request) == (old, 1)
    assert (holder.fleet, holder.number) == (new, 2)


def test_a_holder_is_itself_and_a_fleet_gets_one():
    holder = CurrentFleet(a_fleet())

    assert current(holder) is holder
    assert current(a_fleet()).fleet == a_fleet()
