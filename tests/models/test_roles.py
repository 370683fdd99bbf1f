"""What each kind of process may do with the tables, tried as that process."""

import uuid
from datetime import UTC, datetime

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session

from migrations import roles
from models import (
    budgets,
    devicetime,
    files,
    idempotency,
    jobs,
    learning,
    leases,
    objectives,
    releasing,
    sweeping,
    tenants,
    uploads,
    webhooks,
    workers,
)
from models.devicetime import DevicePeriod, DeviceSeconds
from models.tables import Base
from models.webhooks import AttemptResult
from policy.release import ReleaseLimits
from policy.workers import WorkerTerms
from tests.builders import (
    a_fleet,
    a_job,
    a_lease,
    a_succeeded_job,
    a_tenant,
    hand_off,
    spend,
    store,
)

REFUSED = {
    "gateway": [
        "SELECT secret FROM webhook_secrets",
        "SELECT * FROM audit_events",
        "UPDATE workers SET slots = 1000",
        "DELETE FROM jobs",
        "SELECT audit_ensure_partitions(1000000)",
    ],
    "worker": [
        "SELECT digest FROM api_keys",
        "SELECT secret FROM webhook_secrets",
        "SELECT url FROM webhook_endpoints",
        "SELECT requests_per_minute FROM tenants",
        "UPDATE tenants SET max_concurrent_jobs = NULL",
        "UPDATE jobs SET prompt = ''",
        "UPDATE jobs SET tenant_id = gen_random_uuid()",
        "INSERT INTO jobs DEFAULT VALUES",
        "SELECT object_key FROM artifacts",
        "SELECT * FROM files",
        "SELECT * FROM audit_events",
        "SELECT * FROM audit_log",
        "SELECT * FROM job_history",
        "SELECT audit_ensure_partitions(1000000)",
        "SELECT * FROM audit_verify()",
    ],
    "results": [
        "SELECT prompt FROM jobs",
        "SELECT * FROM jobs",
        "SELECT digest FROM api_keys",
        "SELECT secret FROM webhook_secrets",
        "DELETE FROM artifacts",
        "UPDATE artifacts SET object_key = ''",
        "SELECT * FROM job_history",
    ],
    "sweeper": [
        "SELECT prompt FROM jobs",
        "SELECT metadata FROM jobs",
        "SELECT digest FROM api_keys",
        "SELECT secret FROM webhook_secrets",
        "SELECT answer FROM idempotency_keys",
        "DELETE FROM jobs",
        "DELETE FROM audit_events",
    ],
    "webhooks": [
        "SELECT prompt FROM jobs",
        "UPDATE jobs SET state = 'canceled'",
        "SELECT digest FROM api_keys",
        "SELECT * FROM tenants",
        "UPDATE webhook_endpoints SET url = ''",
        "INSERT INTO webhook_deliveries DEFAULT VALUES",
        "SELECT * FROM files",
    ],
}


@pytest.fixture(scope="module")
def as_process(stack, database):
    """An engine for each kind of process, logged in as it is."""
    engines = {}
    for kind, role in roles.OF_PROCESS.items():
        url = make_url(database.owner_url).set(
            username=role, password=stack.env[f"{kind.upper()}_PASSWORD"]
        )
        engines[kind] = create_engine(url)
    yield engines
    for engine in engines.values():
        engine.dispose()


def test_every_table_says_who_may_touch_it():
    named = {may.table for grants in roles.GRANTS.values() for may in grants} | roles.NOBODYS.keys()

    assert {table.name for table in Base.metadata.sorted_tables} - named == set()


@pytest.mark.parametrize(
    ("kind", "statement"),
    [(kind, statement) for kind, all_of_them in REFUSED.items() for statement in all_of_them],
)
def test_a_process_cannot(as_process, kind, statement):
    with (
        as_process[kind].connect() as connection,
        pytest.raises(ProgrammingError, match="permission denied"),
    ):
        connection.execute(text(statement))


def test_sweeper_may_tell_of_budgets_and_objectives_and_workers_may_keep_their_time(
    as_process, session
):
    tenant = a_tenant(session)
    spend(session, tenant, budget=10, cost=9)
    session.commit()  # for others to see; it is taken back below

    with Session(as_process["sweeper"]) as sweeping:
        assert tenant.id in {
            one.tenant_id for one in budgets.note_reached_thresholds(sweeping, currency="EUR")
        }
        assert budgets.count_over(sweeping) >= 0
        objectives.count(sweeping, a_fleet().tiers)
        assert objectives.attainments(sweeping)
        objectives.forget_old(sweeping)
        sweeping.rollback()
    tenants.limit(session, tenant, changes={"monthly_budget": None}, actor="tests")
    session.commit()
    period = DevicePeriod(
        worker="w",
        instance=uuid.uuid4(),
        pool="local",
        terms=WorkerTerms(),
        since=datetime.now(UTC),
        spent=DeviceSeconds(billed_s=1.0),
    )
    with Session(as_process["worker"]) as working:
        devicetime.put(working, period)
        devicetime.put(working, period)
        working.rollback()


def test_a_process_is_never_the_owner_nor_another_role(as_process):
    for kind, engine in as_process.items():
        with engine.connect() as connection:
            query = (
                "SELECT rolsuper OR rolcreaterole OR rolcreatedb OR rolbypassrls FROM pg_roles "
                "WHERE rolname = current_user"
            )
            assert connection.scalar(text(query)) is False, kind
            assert (
                connection.scalar(
                    text(
                        "SELECT count(*) FROM pg_auth_members WHERE member = current_user::regrole"
                    )
                )
                == 0
            )


def test_a_worker_takes_renders_and_fails_jobs(as_process, database):
    with Session(database.app) as session, session.begin():
        first, second = a_job(session).id, a_job(session).id

    with Session(as_process["worker"], expire_on_commit=False) as session, session.begin():
        workers.heartbeat(session, name="gpu0@roles", pool="local", device="cpu", slots=1, facts={})
        lease = leases.take(session, first, worker="gpu0@roles", device="cpu", ttl_s=15)
        leases.renew(session, [(first, lease.attempt)], worker="gpu0@roles", ttl_s=15)
        hand_off(session, lease)
        other = leases.take(session, second, worker="gpu0@roles", device="cpu", ttl_s=15)
        leases.fail(session, other, code="unsupported", detail="")
        workers.leave(session, "gpu0@roles")
        assert lease.job.prompt

    with Session(database.app) as session:
        assert [jobs.state_of(session, job_id) for job_id in (first, second)] == [
            "storing",
            "failed",
        ]


def test_a_worker_sees_no_prompt_of_a_job_that_is_long_over(as_process, database):
    with Session(database.app, expire_on_commit=False) as session, session.begin():
        over, under_way = a_succeeded_job(session), a_job(session)
    with database.owner.begin() as connection:
        connection.execute(
            text("UPDATE jobs SET finished_at = now() - interval '2 hours' WHERE id = :id"),
            {"id": over.id},
        )

    def seen_by(engine):
        with engine.connect() as connection:
            query = text("SELECT id FROM jobs WHERE id IN (:over, :under_way)")
            return set(connection.scalars(query, {"over": over.id, "under_way": under_way.id}))

    assert seen_by(as_process["worker"]) == {under_way.id}
    for engine in (
        as_process["gateway"],
        as_process["sweeper"],
        as_process["results"],
        database.app,
        database.owner,
    ):
        assert seen_by(engine) == {over.id, under_way.id}


@pytest.mark.parametrize(
    ("condition", "found_by"),
    [
        ("id = '01a22ba7-316c-7b3c-a400-a0e07bd5d144'", "Index Cond: (id ="),
        (
            "pool = 'p' AND tier = 't' AND state = 'queued' AND announced_at IS NULL",
            "Index Cond: ((pool =",
        ),
    ],
)
def test_a_worker_s_searches_are_still_answered_by_an_index(as_process, condition, found_by):
    with as_process["worker"].connect() as connection:
        connection.execute(text("SET enable_seqscan = off"))
        plan = "\n".join(
            connection.scalars(
                text(
                    f"EXPLAIN SELECT id FROM jobs WHERE {condition} ORDER BY release_tag, id "
                    "LIMIT 4"
                )
            )
        )

    assert found_by in plan, plan


def test_a_results_worker_stores_images_whose_prompts_it_cannot_read(as_process, database):
    with Session(database.app, expire_on_commit=False) as session, session.begin():
        lease = a_lease(session)
        hand_off(session, lease)

    with Session(as_process["results"], expire_on_commit=False) as session, session.begin():
        job = store(session, jobs.find_without_texts(session, lease.job_id))
        assert job.state == "succeeded"


def test_the_sweeper_ends_jobs_that_it_cannot_read(as_process, database):
    with Session(database.app, expire_on_commit=False) as session, session.begin():
        job_id = a_job(session, start_within_s=0).id

    with Session(as_process["sweeper"], expire_on_commit=False) as session, session.begin():
        assert jobs.expire(session, job_id).state == "expired"


def test_a_courier_reads_what_is_to_be_told_without_the_prompt(as_process, database):
    with Session(database.app, expire_on_commit=False) as session, session.begin():
        job = a_succeeded_job(session)

    with Session(as_process["webhooks"], expire_on_commit=False) as session, session.begin():
        told = jobs.find_without_prompts(session, job.id, tenant_id=job.tenant_id)
        assert told.state == "succeeded"
        webhooks.due(session, webhooks.endpoints_with_pending(session, after=None, limit=1))
        assert webhooks.due_of_job(session, job.id) == []


def test_the_grants_are_the_same_however_often_they_are_applied(as_process, database):
    query = text(
        "SELECT grantee, table_name, column_name, privilege_type "
        "FROM information_schema.column_privileges WHERE grantee LIKE 'darkroom_%'"
    )
    with database.owner.connect() as connection:
        before = set(connection.execute(query))
        roles.grant(connection)
        after = set(connection.execute(query))
        connection.rollback()

    assert after == before != set()


def test_the_sweeper_can_look_at_everything_that_it_sweeps(as_process, database):
    with Session(database.app, expire_on_commit=False) as session, session.begin():
        silent, unstored, lost = a_lease(session, ttl_s=-1), a_lease(session), a_lease(session)
        late = a_job(session, run_within_s=0.0)
        hand_off(session, unstored)
        hand_off(session, lost)

    with Session(as_process["sweeper"], expire_on_commit=False) as session, session.begin():
        looks = (
            sweeping.expired_leases,
            sweeping.missed_starts,
            sweeping.overruns,
            sweeping.overdue_stores,
            learning.newly_ended,
        )
        for look in looks:
            look(session)
        assert leases.lose(session, silent.job_id, max_attempts=5).state == "queued"
        sweeping.postpone_store(session, unstored.job_id, store_within_s=10)
        assert leases.lose_hand_off(session, lost.job_id, [0], attempt_of={0: 1}) is not None
        assert jobs.fail_past_deadline(session, late.id) is None
        ids = [silent.job_id, unstored.job_id]
        assert sweeping.awaited_pixels(session, ids)
        sweeping.finished_of(session, ids)
        sweeping.rendered_of(session, ids)
        releasing.announced(session, pool="local", tier="fast", older_than_s=0)
        releasing.pick(
            session, pool="local", tier="fast", limits=ReleaseLimits(slots=1, limit_images=1)
        )
        uploads.are_left_behind(session, older_than_s=0)
        webhooks.due(session, webhooks.endpoints_with_pending(session, after=None, limit=1))
        webhooks.pending(session)
        webhooks.forget_old(session, limit=1)
        idempotency.forget_old(session, limit=1)
        workers.forget_the_silent(session, silent_for_s=3600)
        sweeping.ensure_audit_partitions(session)
        session.execute(text("SELECT * FROM queue_now"))


def test_a_results_worker_can_bring_store_and_tidy(as_process, database):
    with Session(database.app, expire_on_commit=False) as session, session.begin():
        lease = a_lease(session)
        hand_off(session, lease)

    with Session(as_process["results"], expire_on_commit=False) as session, session.begin():
        assert jobs.handed_off(session, lease.job_id) == {0: 1}
        uploads.begin(session, "t/x")
        assert uploads.left_behind(session, older_than_s=-1) == "t/x"
        uploads.end(session, "t/x")
        assert files.find(session, lease.job_id, tenant_id=lease.job.tenant_id) is None
        assert leases.lose_hand_off(session, lease.job_id, [0], attempt_of={0: 1}).state == "queued"
        releasing.pick(
            session, pool="local", tier="fast", limits=ReleaseLimits(slots=1, limit_images=1)
        )


def test_a_courier_claims_records_and_disables(as_process, database):
    with Session(database.app, expire_on_commit=False) as session, session.begin():
        job = a_job(session)
        wish = {
            "url": "https://x.example",
            "events": ["job.canceled"],
            "description": "",
            "secret": "whsec_x",
            "actor": "tests",
        }
        endpoint = webhooks.create(session, tenant_id=job.tenant_id, **wish)
        session.flush()
        jobs.cancel(session, job.id, tenant_id=job.tenant_id, actor="tests")

    with Session(as_process["webhooks"], expire_on_commit=False) as session, session.begin():
        [delivery_id] = webhooks.due_of_job(session, job.id)
        claim = webhooks.claim(session, delivery_id)
        assert claim.secrets == ("whsec_x",)
        tried = AttemptResult(status=410, error=None, took_s=0.1, try_again_s=None)
        assert webhooks.record(session, claim, tried, actor="tests") == "gone"
        assert webhooks.next_of_endpoint(session, endpoint.id) is None
