"""Jobs that waited too long for their pool go to another one that has idle room, and only there."""

import uuid

import pytest
from sqlalchemy import text

from dispatch.release import Release
from edges.broker import Broker
from models import jobs, leases, overflowing, workers
from models.database import transaction
from models.tables import Job, Tenant
from tests.builders import GONE, a_fleet, a_job, a_tenant
from tests.dispatch.test_release_of_jobs import messages

AFTER_S = 20.0


@pytest.fixture
def own() -> str:
    return f"own-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def spot() -> str:
    return f"spot-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def release_with(database, settings, broker_redis, own, spot):
    """The release of a fleet whose pool `own` overflows into `spot`, which has `keys` more."""

    def release_with(changes=(), **keys) -> Release:
        shape = {"models": ["pocket"], "slots": 8, "max_batch_rows": 8}
        fleet = a_fleet(
            {
                "pools.local": GONE,
                f"pools.{own}": shape | {"overflow_to": spot, "overflow_after_s": AFTER_S},
                f"pools.{spot}": shape | keys,
                **dict(changes),
            }
        )
        return Release(database.app, Broker(settings, fleet), fleet, worker_silence_s=15)

    return release_with


@pytest.fixture
def lives(database):
    def lives(pool, slots=8, held=None) -> None:
        with transaction(database.app) as session:
            workers.heartbeat(
                session,
                name=f"gpu0@{pool}",
                pool=pool,
                device="cpu",
                slots=slots,
                facts={},
                held=held,
            )

    return lives


@pytest.fixture
def accept(database, own):
    """Accept that many jobs that have waited for so long; their ids in fair order."""

    def accept(count, *, waited_s=2 * AFTER_S, pool=own, tenant=None, num_images=1, first=0.0):
        with transaction(database.app) as session:
            mine = session.get(Tenant, tenant) if tenant else None
            made = [
                a_job(
                    session,
                    pool=pool,
                    tenant=mine,
                    predicted_s=1.0,
                    start_within_s=600,
                    num_images=num_images,
                    release_tag=first + number,
                ).id
                for number in range(count)
            ]
            session.execute(
                text(
                    "UPDATE jobs SET accepted_at = accepted_at - make_interval(secs => :waited)"
                    " WHERE id = ANY(:ids)"
                ),
                {"waited": waited_s, "ids": made},
            )
        return made

    return accept


@pytest.fixture
def pool_of(database):
    def pool_of(job_id) -> str:
        with transaction(database.app) as session:
            return session.get_one(Job, job_id).pool

    return pool_of


def queued(database, pool) -> tuple[int, float]:
    """The jobs and device seconds that the flows of the pool count."""
    query = "SELECT sum(queued_jobs), sum(queued_s) FROM flows WHERE pool = :pool"
    with transaction(database.app) as session:
        jobs, seconds = session.execute(text(query), {"pool": pool}).one()
    return int(jobs or 0), float(seconds or 0.0)


def test_late_jobs_go_to_the_other_pool_as_far_as_it_has_room(
    release_with, lives, accept, pool_of, database, broker_redis, own, spot
):
    release = release_with()
    lives(spot, slots=3)
    late = accept(4)
    release.release(own, "fast")  # nobody takes these messages

    assert release.overflow(own, "fast") == 3

    assert [pool_of(job_id) for job_id in late] == [spot, spot, spot, own]
    assert sorted(messages(broker_redis, spot)) == sorted(late[:3])
    assert (queued(database, own), queued(database, spot)) == ((1, 1.0), (3, 3.0))
    assert release.overflow(own, "fast") == 0


def test_a_job_stays_while_it_has_not_waited_long_enough(release_with, lives, accept, own, spot):
    lives(spot)
    accept(2, waited_s=AFTER_S / 2)

    assert release_with().overflow(own, "fast") == 0


@pytest.mark.parametrize("held", [None, []], ids=["no live worker", "none that serves the model"])
def test_a_job_stays_where_nobody_could_render_it(release_with, lives, accept, own, spot, held):
    if held is not None:
        lives(spot, held=held)
    accept(2)

    assert release_with().overflow(own, "fast") == 0


def test_a_job_larger_than_the_room_does_not_keep_those_behind_it(
    release_with, lives, accept, pool_of, own, spot
):
    lives(spot, slots=2)
    [large] = accept(1, num_images=4)
    small = accept(2, first=1.0)

    assert release_with().overflow(own, "fast") == 2

    assert [pool_of(job_id) for job_id in (large, *small)] == [own, spot, spot]


def test_a_job_that_came_from_a_third_pool_has_not_waited_here_yet(
    release_with, lives, accept, database, own, spot
):
    lives(spot)
    [job_id] = accept(1, pool=f"gone-{own}")
    with transaction(database.app) as session:
        jobs.move(session, job_id, own)

    assert release_with().overflow(own, "fast") == 0


@pytest.mark.parametrize(
    ("announced", "moved"), [(0, 2), (2, 0)], ids=["under its cap", "at its cap"]
)
def test_a_tenant_at_its_cap_gets_no_more_by_another_pool(
    release_with, lives, accept, database, own, spot, announced, moved
):
    with transaction(database.app) as session:
        tenant = a_tenant(session).id
    release = release_with({"tiers.fast.max_in_hand_per_tenant": 2})
    accept(announced, tenant=tenant)
    lives(own)
    release.release(own, "fast")
    lives(spot)
    accept(3, tenant=tenant, first=5.0)

    assert release.overflow(own, "fast") == moved


def test_an_announced_job_stays_where_a_live_worker_may_take_it(
    release_with, lives, accept, own, spot
):
    release = release_with()
    lives(own)
    accept(2)
    release.release(own, "fast")
    lives(spot)

    assert release.overflow(own, "fast") == 0


def test_a_tenant_s_long_backlog_is_not_read_to_find_late_jobs(database, own, spot):
    """By the plan: one probe of an index a tenant, and no sort of what waits."""
    asked = {"pool": own, "tier": "fast", "room": 8, "after_s": AFTER_S, "without": []}
    asked |= {"checkpoints": ["pocket@1"], "tenants": []}
    with transaction(database.app) as session:
        session.execute(text("SET LOCAL enable_seqscan = off"))
        statement = overflowing._WAITING.compile(session.connection())
        plan = session.connection().exec_driver_sql(
            f"EXPLAIN {statement}", statement.construct_params(asked)
        )
        told = "\n".join(row[0] for row in plan)

    assert "jobs_ready_by_tenant" in told, told


def test_a_job_stays_while_jobs_of_the_other_pool_wait_themselves(
    release_with, lives, accept, own, spot
):
    lives(spot)
    accept(1, pool=spot)
    accept(1)

    assert release_with().overflow(own, "fast") == 0


def test_a_job_never_overflows_into_a_pool_that_is_reserved_for_other_tenants(
    release_with, lives, accept, pool_of, database, own, spot
):
    with transaction(database.app) as session:
        tenant = a_tenant(session)
        acme = tenant.id, tenant.name
    lives(spot)
    [of_another] = accept(1)
    [of_acme] = accept(1, tenant=acme[0])

    assert release_with(tenants=[acme[1]]).overflow(own, "fast") == 1

    assert (pool_of(of_another), pool_of(of_acme)) == (own, spot)


def test_a_worker_does_not_take_a_job_that_left_its_pool(
    release_with, lives, accept, database, own, spot
):
    lives(spot)
    [job_id] = accept(1)
    release_with().overflow(own, "fast")

    def taken_by(pool):
        with transaction(database.app) as session:
            return leases.take(
                session, job_id, worker=f"gpu0@{pool}", device="cpu", ttl_s=15, pool=pool
            )

    assert taken_by(own) is None
    assert taken_by(spot) is not None


def test_the_audit_log_tells_that_a_job_changed_its_pool(
    release_with, lives, accept, database, own, spot
):
    lives(spot)
    [job_id] = accept(1)
    release_with().overflow(own, "fast")

    query = "SELECT facts FROM audit_events WHERE job_id = :id AND event = 'job:pool:changed'"
    with transaction(database.owner) as session:
        facts = session.scalar(text(query), {"id": job_id})

    assert (facts["left"], facts["pool"]) == (own, spot)
