"""The sweeper's own time: what fails comes again a little later, what there is too much of goes on
at the next sweep.
"""

import threading
import time
import uuid
from dataclasses import replace
from datetime import timedelta

import pytest
import redis
from sqlalchemy import null, text

import tasks.sweep
from edges.broker import job_of_message
from models import jobs, learning, webhooks
from models.database import make_engine, transaction
from models.tables import IdempotencyKey, WebhookAttempt, WebhookDelivery, WebhookEndpoint
from policy import queues
from policy.current import CurrentFleet
from policy.prediction import FIRST_RATIOS
from tasks.sweep import Sweeper
from tests.builders import a_fleet, a_job, a_lease, a_succeeded_job, a_tenant, until
from tests.models.conftest import a_database
from tests.models.test_pruning import age
from tests.tasks.conftest import metric


@pytest.fixture
def parts(sweeper, monkeypatch):
    """Have the sweeper consist of these parts, (what it does, how often) by its name.

    Counts how often each was called.
    """
    called = dict[str, int]()

    def parts(**own):
        def named(name, act):
            def part():
                called[name] = called.get(name, 0) + 1
                return act()

            part.__name__ = name
            return part

        made = [(named(name, act), every_s) for name, (act, every_s) in own.items()]
        monkeypatch.setattr(Sweeper, "_parts", lambda self: made)
        return called

    return parts


def fails():
    raise ValueError("nobody foresaw this")


def test_a_part_that_fails_is_tried_again_later_and_not_at_each_sweep(sweeper, parts, monkeypatch):
    called = parts(hourly=(fails, 3600), always=(fails, 0))

    for _ in range(3):
        sweeper.sweep()
    assert called == {"hourly": 1, "always": 3}

    now = time.monotonic
    monkeypatch.setattr(tasks.sweep.time, "monotonic", lambda: now() + tasks.sweep.AGAIN_AFTER_S)
    sweeper.sweep()
    assert called == {"hourly": 2, "always": 4}


def test_a_part_that_has_more_to_do_comes_again_at_the_next_sweep(sweeper, parts):
    left = [True, False, False]
    called = parts(hourly=(lambda: left.pop(), 3600))

    for _ in range(5):
        sweeper.sweep()

    assert called == {"hourly": 3}


@pytest.fixture
def old_rows(database_here):
    """So many webhook deliveries of forty days ago, and idempotency keys of the day before
    yesterday.
    """

    def old_rows(count):
        with transaction(database_here) as session:
            tenant = a_tenant(session)
            endpoint = WebhookEndpoint(tenant_id=tenant.id, url="https://example.com", events=[])
            session.add(endpoint)
            session.flush()
            old = text("SELECT clock_timestamp() - interval '40 days'")
            at = session.scalar(old)
            for _ in range(count):
                session.add(
                    WebhookDelivery(
                        endpoint_id=endpoint.id,
                        tenant_id=tenant.id,
                        event="job.succeeded",
                        state="delivered",
                        created_at=at,
                        due_at=null(),
                        ended_at=at,
                    )
                )
                session.add(
                    IdempotencyKey(
                        tenant_id=tenant.id, key=uuid.uuid4().hex, request_sha256="", created_at=at
                    )
                )
        return tenant

    return old_rows


def count_of(database, table, tenant) -> int:
    with transaction(database) as session:
        return session.scalar(
            text(f"SELECT count(*) FROM {table} WHERE tenant_id = :id"), {"id": tenant.id}
        )


@pytest.mark.parametrize("table", ["webhook_deliveries", "idempotency_keys"])
def test_everything_that_is_too_old_goes_in_one_sweep_in_small_pieces(
    sweeper, database_here, old_rows, monkeypatch, table
):
    monkeypatch.setattr(tasks.sweep, "PIECE", 3)
    tenant = old_rows(10)

    sweeper.sweep()

    assert count_of(database_here, table, tenant) == 0


def test_deliveries_that_ended_a_month_ago_go_with_their_attempts(sweeper, database_here):
    with transaction(database_here) as session:
        tenant = a_tenant(session)
        endpoint = WebhookEndpoint(tenant_id=tenant.id, url="https://example.com", events=[])
        session.add(endpoint)
        session.flush()

        def delivery(days, **columns):
            at = session.scalar(text(f"SELECT clock_timestamp() - interval '{days} days'"))
            ended = {"state": "delivered", "due_at": null(), "ended_at": at}
            common = {"endpoint_id": endpoint.id, "tenant_id": tenant.id, "event": "job.succeeded"}
            row = WebhookDelivery(created_at=at, **common, **(columns or ended))
            session.add(row)
            session.flush()
            session.add(WebhookAttempt(delivery_id=row.id, attempt=1, status=204, took_s=0.1))
            return row.id

        soon = session.scalar(text("SELECT clock_timestamp() + interval '1 hour'"))
        delivery(31)
        kept = {delivery(29), delivery(31, state="pending", due_at=soon)}

    sweeper.sweep()

    with transaction(database_here) as session:
        of_tenant = {"id": tenant.id}
        rows = text("SELECT id FROM webhook_deliveries WHERE tenant_id = :id")
        assert set(session.scalars(rows, of_tenant)) == kept
        attempts = text(
            "SELECT a.delivery_id FROM webhook_attempts a"
            " LEFT JOIN webhook_deliveries d ON d.id = a.delivery_id WHERE d.tenant_id = :id "
            "OR d.id IS NULL"
        )
        assert set(session.scalars(attempts, of_tenant)) == kept


def test_a_sweep_has_an_end_however_much_is_too_old(sweeper, database_here, old_rows, monkeypatch):
    monkeypatch.setattr(tasks.sweep, "PIECE", 3)
    monkeypatch.setattr(tasks.sweep, "AT_MOST_S", 0)
    tenant = old_rows(10)

    left = []
    for _ in range(4):
        sweeper.sweep()
        left.append(count_of(database_here, "webhook_deliveries", tenant))

    assert left == [7, 4, 1, 0]


@pytest.fixture
def keeps_for_a_month(stack, sweeper):
    """A sweeper of a fleet whose tier `fast` keeps content for thirty days, and the owner of its
    database.
    """
    with a_database(stack.env) as database:
        owner = make_engine(database.owner_url, pool_size=2)
        yield (
            replace(
                sweeper,
                current=CurrentFleet(a_fleet({"tiers.fast.retention_days": 30})),
                database=database.app,
            ),
            owner,
        )
        owner.dispose()


@pytest.mark.parametrize("at_a_time", [2000, 2])
def test_content_is_erased_once_its_tier_has_kept_it_long_enough(
    keeps_for_a_month, monkeypatch, at_a_time
):
    monkeypatch.setattr(tasks.sweep, "LOOKED_AT", at_a_time)
    sweeper, owner = keeps_for_a_month
    with transaction(owner) as session:
        tenant = a_tenant(session)

        def canceled(**params):
            return jobs.cancel(
                session,
                a_job(session, tenant=tenant, **params).id,
                tenant_id=tenant.id,
                actor="tests",
            )

        old = [age(session, a_succeeded_job(session, tenant=tenant)), age(session, canceled())]
        unfinished = age(session, a_job(session, tenant=tenant))
        other_tier, young = age(session, canceled(tier="batch")), canceled().id
        late = age(session, canceled())

    def erased():
        with transaction(owner) as session:
            return set(
                session.scalars(
                    text("SELECT id FROM jobs WHERE erased_at IS NOT NULL AND prompt = ''")
                )
            )

    sweeper.sweep()
    assert erased() == {*old, late}
    with transaction(owner) as session:
        assert (
            session.scalar(text("SELECT count(*) FROM uploads WHERE started_at = to_timestamp(0)"))
            == 1
        )
        event = session.execute(
            text("SELECT actor FROM audit_log WHERE job_id = :id AND event = 'job:content:erased'"),
            {"id": late},
        ).one()
        assert event.actor == "sweeper"
        moved = (
            "UPDATE jobs SET state = 'canceled', "
            "finished_at = clock_timestamp() - interval '40 days' WHERE id = :id"
        )
        session.execute(text(moved), {"id": unfinished})

    sweeper._due_at.clear()
    sweeper.sweep()
    assert erased() == {*old, late, unfinished}
    assert not erased() & {other_tier, young}


def test_pending_deliveries_are_counted_up_to_a_number_and_no_further(database_here, monkeypatch):
    with transaction(database_here) as session:
        tenant = a_tenant(session)
        endpoint = WebhookEndpoint(tenant_id=tenant.id, url="https://example.com", events=[])
        session.add(endpoint)
        session.flush()
        for _ in range(5):
            session.add(
                WebhookDelivery(endpoint_id=endpoint.id, tenant_id=tenant.id, event="job.succeeded")
            )
        session.flush()
        monkeypatch.setattr(webhooks, "PENDING_COUNTED", 3)

        assert webhooks.pending(session) == 3
        session.rollback()


def test_a_sweep_that_is_asked_for_during_another_leaves_what_that_one_knows(sweeper, parts):
    known = []

    def sees_an_outage():
        sweeper._saw_outage = True
        asked_for = threading.Thread(target=sweeper.sweep)
        asked_for.start()
        asked_for.join()
        known.append(sweeper._saw_outage)

    called = parts(outages=(sees_an_outage, 0))
    sweeper.sweep()

    assert known == [True]
    assert list(called.values()) == [1]


def test_a_message_is_lost_when_one_announced_clearly_later_is_next_in_its_queue(
    sweeper, database_here
):
    with transaction(database_here) as session:
        overtaken, close, next_one = (
            a_job(session, pool="big", model="large", tier="batch") for _ in range(3)
        )
        for job, ago_s in ((overtaken, 40), (close, 21), (next_one, 20)):
            announced = text(
                "UPDATE jobs SET announced_at = clock_timestamp() - make_interval(secs => :ago) "
                "WHERE id = :id"
            )
            session.execute(announced, {"ago": ago_s, "id": job.id})
    sweeper.broker.announce(queues.RENDER_JOB, "big.batch", next_one.id, num_images=1)

    sweeper.sweep()

    with redis.Redis.from_url(sweeper.settings.broker_url) as broker:
        waiting = [job_of_message(raw) for raw in reversed(broker.lrange("big.batch", 0, -1))]
    assert waiting == [next_one.id, overtaken.id]


@pytest.mark.parametrize("how", ["lease", "start_deadline", "run_deadline"])
def test_sweep_that_ends_a_job_tells_whoever_waits_for_it(sweeper, database_here, ended_jobs, how):
    with transaction(database_here) as session:
        if how == "lease":
            job = a_lease(session, ttl_s=-1).job
            job.counted_attempts = sweeper.settings.max_attempts - 1
        elif how == "start_deadline":
            job = a_job(session, start_within_s=-1)
        else:
            job = a_job(session, run_within_s=1)
            job.attempt, job.run_by = 1, job.accepted_at

    sweeper.sweep()

    until(lambda: job.id in ended_jobs, within_s=60, what="the word of its end")
    with transaction(database_here) as session:
        final_state = "expired" if how == "start_deadline" else "failed"
        assert session.get(type(job), job.id).state == final_state


def test_sweep_forgets_the_measures_of_a_queue_that_is_empty_again(sweeper, database_here):
    with transaction(database_here) as session:
        tenant = a_tenant(session)
        job = a_job(session, tenant=tenant, pool="big", tier="quality", model="large")
    sweeper.sweep()
    assert metric("darkroom_queue_oldest_wait_seconds", pool="big", tier="quality") > 0

    with transaction(database_here) as session:
        jobs.cancel(session, job.id, tenant_id=tenant.id, actor="tests")
    sweeper.sweep()

    assert metric("darkroom_queue_oldest_wait_seconds", pool="big", tier="quality") == 0


def test_sweep_measures_the_deliveries_that_are_not_over(sweeper, database_here):
    sweeper.sweep()
    before = metric("darkroom_webhooks_pending")
    with transaction(database_here) as session:
        tenant = a_tenant(session)
        endpoint = WebhookEndpoint(tenant_id=tenant.id, url="https://example.com", events=[])
        session.add(endpoint)
        session.flush()
        columns = {"endpoint_id": endpoint.id, "tenant_id": tenant.id, "event": "job.failed"}
        session.add(WebhookDelivery(**columns))
        session.add(WebhookDelivery(**columns))

    sweeper.sweep()

    assert metric("darkroom_webhooks_pending") == before + 2


def a_due_delivery(session, tenant) -> uuid.UUID:
    """A delivery that is due at an endpoint of its own."""
    endpoint = WebhookEndpoint(tenant_id=tenant.id, url="https://example.com", events=[])
    session.add(endpoint)
    session.flush()
    delivery = WebhookDelivery(endpoint_id=endpoint.id, tenant_id=tenant.id, event="job.failed")
    session.add(delivery)
    session.flush()
    return delivery.id


def test_each_sweep_looks_at_the_endpoints_after_those_of_the_sweep_before_it(
    sweeper,
    stack,
    monkeypatch,
):
    monkeypatch.setattr(tasks.sweep, "ENDPOINTS_AT_A_TIME", 2)
    asked = []
    monkeypatch.setattr(sweeper.broker, "ask_to_deliver", asked.append)
    with a_database(stack.env) as database:
        sweeper = replace(sweeper, database=database.app)
        with transaction(database.app) as session:
            due = {a_due_delivery(session, a_tenant(session)) for _ in range(5)}

        for sweeps in range(1, 4):
            sweeper.sweep()
            assert len(set(asked)) == min(2 * sweeps, 5), "nobody claims what is asked for"
        sweeper.sweep()

    assert set(asked) == due
    assert len(asked) == 7, "from the first one on again"


@pytest.mark.parametrize(("took_s", "is_longer"), [(50.0, True), (2.0, False)])
def test_jobs_that_took_longer_than_was_guessed_make_the_next_guess_longer(
    sweeper,
    stack,
    took_s,
    is_longer,
):
    with a_database(stack.env) as database:
        sweeper = replace(sweeper, database=database.app)
        with transaction(database.app) as session:
            job = a_succeeded_job(session, eta_raw_s=10.0)
            ended = "finished_at = clock_timestamp() - interval '5 s'"
            accepted = "accepted_at = clock_timestamp() - make_interval(secs => :s)"
            query = text(f"UPDATE jobs SET {ended}, {accepted} WHERE id = :id")
            session.execute(query, {"id": job.id, "s": 5 + took_s})

        sweeper.sweep()

        with transaction(database.app) as session:
            learnt = learning.eta_of(session, pool="local", tier="fast")
            assert (learnt.ratio_p50 > FIRST_RATIOS[0]) is is_longer


def test_content_is_kept_for_as_many_days_as_its_tier_says(keeps_for_a_month):
    sweeper, owner = keeps_for_a_month
    with transaction(owner) as session:
        tenant = a_tenant(session)

        def canceled(days):
            job = a_job(session, tenant=tenant)
            jobs.cancel(session, job.id, tenant_id=tenant.id, actor="tests")
            return age(session, job, timedelta(days=days))

        old, young = canceled(31), canceled(29)

    sweeper.sweep()

    with transaction(owner) as session:
        rows = session.execute(text("SELECT id, erased_at IS NOT NULL FROM jobs"))
        assert dict(tuple(row) for row in rows) == {old: True, young: False}


def test_queue_that_is_backed_up_keeps_no_other_tier_from_its_pictures(sweeper, monkeypatch):
    asked = []

    def waiting(queue):
        return 1000 if queue == "results.fast" else 0

    def ask_for_inputs_again(pool, tier, *, asked_before_s):
        asked.append((pool, tier))
        return 0

    monkeypatch.setattr(sweeper.broker, "waiting", waiting)
    monkeypatch.setattr(sweeper.release, "ask_for_inputs_again", ask_for_inputs_again)

    sweeper.sweep()

    pools_and_tiers = {(pool, tier) for pool in ("local", "big") for tier in ("quality", "batch")}
    assert set(asked) == pools_and_tiers
