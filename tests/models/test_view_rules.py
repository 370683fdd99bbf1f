"""Rules of single views that one row each does not show: days are UTC's, sums over attempts, what a view forgets."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from sqlalchemy import text

from models import audit, files, jobs, leases, webhooks
from models.tables import Tenant
from models.webhooks import Tried
from tests.builders import a_job, a_lease, a_succeeded_job, a_tenant, hand_off, resolved, store

# Where it is another day than in UTC before noon, and after ten o'clock: at any time in one of them.
FAR_FROM_UTC = ("Etc/GMT+12", "Etc/GMT-14")


PARTITIONS = "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'audit_events'::regclass"


@pytest.fixture(params=FAR_FROM_UTC)
def abroad(request, session):
    """The application's session with a time zone of its own, as a Postgres has that is not set to UTC."""
    session.execute(text(f"SET LOCAL TimeZone = '{request.param}'"))
    return session


def utc_day(session):
    instant = session.scalar(text("SELECT clock_timestamp()"))
    return instant.astimezone(UTC).date()


def rows_of(session, view: str, tenant: Tenant) -> list:
    return list(session.execute(text(f"SELECT * FROM {view} WHERE tenant = :name"), {"name": tenant.name}))


def test_job_history_says_what_was_asked_and_where_the_time_went(session):
    tenant = a_tenant(session)
    lease = a_lease(session, tenant=tenant, num_images=2, negative_prompt="blue", tier="quality", determinism="reproducible", bucket_rows=8)
    for index, shared_steps in ((0, 3), (1, 1)):
        hand_off(session, lease, index, steps=4, shared_steps=shared_steps, max_rows=6, max_images=3, device_seconds=0.25)
        store(session, lease.job, index)
    session.execute(
        text(
            """UPDATE jobs SET started_at = accepted_at + interval '1.5 s', rendered_at = accepted_at + interval '4 s',
               finished_at = accepted_at + interval '4.25 s' WHERE id = :id"""
        ),
        {"id": lease.job_id},
    )

    [row] = rows_of(session, "job_history", tenant)

    assert (row.pool, row.model, row.model_version) == ("local", "pocket", "1")
    assert (row.prompt, row.negative_prompt, row.size, row.num_steps) == ("a red circle", "blue", "128x128", 4)
    assert (row.guidance, row.sampler, row.seed, row.num_images) == (4.0, "ddim", 7, 2)
    assert (row.output_format, row.precision) == ("png", "fp32")
    assert (row.job_id, row.state, row.tier, row.determinism, row.bucket_rows) == (
        lease.job_id,
        "succeeded",
        "quality",
        "reproducible",
        8,
    )
    assert (row.queue_s, row.render_s, row.store_s, row.total_s) == (
        Decimal("1.5"),
        Decimal("2.5"),
        Decimal("0.25"),
        Decimal("4.25"),
    )
    assert (row.attempts, row.worker, row.device) == (1, "gpu0@here", "cpu")
    assert (row.max_batch_images, row.max_batch_rows, row.steps_run, row.steps_shared) == (3, 6, 8, 4)
    assert (row.gpu_seconds, row.cost, row.currency) == (Decimal("0.5"), lease.job.cost, "EUR")
    assert (row.failure_code, row.failure_detail, row.images_stored, row.steps_abandoned) == (None, None, 2, 0)


def test_job_history_adds_up_the_attempts_of_a_job(session):
    tenant = a_tenant(session)
    job = a_job(session, tenant=tenant)
    leases.count_error(session, a_lease(session, job, worker="gpu0@here"), detail="no", max_attempts=5)
    session.execute(text("UPDATE attempts SET steps = 3, max_rows = 9 WHERE job_id = :id"), {"id": job.id})
    hand_off(session, a_lease(session, job, worker="gpu1@there"), steps=4, max_rows=2)

    [row] = rows_of(session, "job_history", tenant)

    assert (row.attempts, row.worker, row.steps_run, row.max_batch_rows) == (2, "gpu1@there", 7, 9)


@pytest.mark.parametrize(("end", "abandoned"), [("canceled", 4), ("failed", 0)])
def test_job_history_counts_steps_as_abandoned_only_where_the_tenant_took_the_job_back(session, end, abandoned):
    tenant = a_tenant(session)
    lease = a_lease(session, tenant=tenant, num_images=2)
    hand_off(session, lease, num_steps=4, steps=4)
    if end == "canceled":
        jobs.cancel(session, lease.job_id, tenant_id=tenant.id, actor="tests")
    else:
        leases.fail(session, lease, code="internal", detail="no")

    [row] = rows_of(session, "job_history", tenant)

    assert (row.state, row.images_stored, row.steps_abandoned) == (end, 0, abandoned)


def test_job_history_counts_no_more_steps_of_an_image_than_its_tenant_was_counted_for(session):
    """As the ledger does: a pipeline may make more."""
    tenant = a_tenant(session)
    lease = a_lease(session, tenant=tenant)
    hand_off(session, lease, num_steps=6, steps=6)
    jobs.cancel(session, lease.job_id, tenant_id=tenant.id, actor="tests")

    [row] = rows_of(session, "job_history", tenant)

    assert (row.num_steps, row.steps_abandoned) == (4, 4)


def test_job_history_shows_a_job_that_nobody_has_begun(session):
    tenant = a_tenant(session)
    a_job(session, tenant=tenant)

    [row] = rows_of(session, "job_history", tenant)

    assert (row.state, row.attempts, row.device, row.steps_run, row.max_batch_images) == ("queued", 0, None, 0, 0)
    assert (row.queue_s, row.render_s, row.store_s, row.total_s) == (None,) * 4


def test_images_by_tenant_day_shares_the_cost_out_by_device_time_and_keeps_tiers_apart(session):
    tenant = a_tenant(session)
    lease = a_lease(session, tenant=tenant, num_images=2)
    for index, device_seconds in ((0, 0.25), (1, 0.75)):
        hand_off(session, lease, index, device_seconds=device_seconds)
        store(session, lease.job, index)
    batch = a_succeeded_job(session, tenant=tenant, tier="batch")

    rows = {row.tier: row for row in rows_of(session, "images_by_tenant_day", tenant)}

    assert {tier: (row.images, row.size_bytes, row.gpu_seconds, row.cost) for tier, row in rows.items()} == {
        "fast": (2, 2000, Decimal("1.000"), lease.job.cost),
        "batch": (1, 1000, Decimal("0.500"), batch.cost),
    }
    assert {(row.model, row.currency, row.day) for row in rows.values()} == {("pocket", "EUR", utc_day(session))}


def test_a_day_is_utc_s_for_the_ledger_whatever_postgres_is_set_to(abroad):
    tenant = a_tenant(abroad)

    job = a_job(abroad, tenant=tenant)

    assert job.usage_day == utc_day(abroad)
    assert [row.day for row in rows_of(abroad, "usage_by_tenant_day", tenant)] == [utc_day(abroad)]


def test_a_day_is_utc_s_for_stored_images_whatever_postgres_is_set_to(abroad):
    tenant = a_tenant(abroad)

    a_succeeded_job(abroad, tenant=tenant)

    assert [row.day for row in rows_of(abroad, "images_by_tenant_day", tenant)] == [utc_day(abroad)]


def test_the_audit_log_verifies_whatever_postgres_is_set_to(abroad):
    job = a_succeeded_job(abroad)
    abroad.execute(text("SET LOCAL TimeZone = 'Asia/Tokyo'"))

    problems = abroad.execute(text("SELECT * FROM audit_verify(:chain)"), {"chain": str(job.tenant_id)}).all()

    assert problems == []


@pytest.mark.parametrize("zone", FAR_FROM_UTC)
def test_a_month_of_the_audit_log_is_utc_s_whatever_postgres_is_set_to(database, zone):
    """As it is made again, where another zone is set."""
    bounds = text("SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE oid = to_regclass(:name)")
    with database.owner.connect() as connection:
        query = "SELECT to_char(now() AT TIME ZONE 'UTC' + interval '12 months', 'YYYY_MM')"
        name = f"audit_events_{connection.scalar(text(query))}"
        before = connection.scalar(bounds, {"name": name})
        months = set(connection.scalars(text(PARTITIONS)))
        connection.execute(text(f"DROP TABLE {name}"))
        connection.execute(text(f"SET LOCAL TimeZone = '{zone}'"))

        connection.execute(text("SELECT audit_ensure_partitions(12)"))

        connection.execute(text("SET LOCAL TimeZone = 'UTC'"))
        after = connection.scalar(bounds, {"name": name})
        assert set(connection.scalars(text(PARTITIONS))) == months
        connection.rollback()

    assert after == before
    assert before is not None


def test_the_audit_log_is_readable_and_leaves_long_facts_to_the_whole_of_them(session):
    tenant = a_tenant(session)
    job = a_job(session, tenant=tenant, seed=11)
    facts = {"b": 2, "a": "x", "long": "y" * 65}
    audit.append(session, "test:thing:happened", chain=tenant.id, actor="tests", attempt=3, **facts)

    rows = session.execute(text("SELECT * FROM audit_log WHERE chain = :name ORDER BY seq"), {"name": tenant.name}).all()

    assert [row.event for row in rows] == ["tenant:record:created", "job:request:accepted", "test:thing:happened"]
    accepted, happened = rows[1:]
    assert (accepted.job_id, accepted.actor) == (job.id, "tests")
    assert accepted.facts_text == "model=pocket model_version=1 num_images=1 pool=local seed=11 tier=fast"
    assert (happened.facts_text, happened.attempt, happened.facts) == ("a=x b=2", 3, facts)
    assert happened.prev_hash == accepted.hash


def test_queue_now_says_how_long_the_oldest_has_waited_in_each_tier(session):
    pool = f"pool-{datetime.now(UTC):%H%M%S%f}"
    old, _, other = (a_job(session, pool=pool, tier=tier) for tier in ("fast", "fast", "batch"))
    age = text("UPDATE jobs SET accepted_at = clock_timestamp() - make_interval(secs => :age_s) WHERE id = :id")
    session.execute(age, {"age_s": 100, "id": old.id})
    session.execute(age, {"age_s": 50, "id": other.id})
    hand_off(session, a_lease(session, pool=pool, tier="quality", determinism="reproducible", bucket_rows=8))

    rows = session.execute(text("SELECT * FROM queue_now WHERE pool = :pool"), {"pool": pool}).all()

    waits = {row.tier: row.oldest_wait_s for row in rows}
    assert waits == {"fast": pytest.approx(100, abs=10), "batch": pytest.approx(50, abs=10), "quality": None}
    assert {row.tier: (row.waiting, row.storing) for row in rows} == {"fast": (2, 0), "batch": (1, 0), "quality": (0, 1)}


def an_endpoint(session, tenant, **changes):
    wish = {"url": "https://x.example", "events": ["job.succeeded"], "description": "", "secret": "whsec_x"}
    endpoint = webhooks.create(session, tenant_id=tenant.id, actor="tests", **wish | changes)
    session.flush()
    return endpoint


def test_webhooks_now_says_what_waits_and_how_the_last_attempt_ended(session):
    tenant = a_tenant(session)
    endpoint = an_endpoint(session, tenant)
    for _ in range(3):
        a_succeeded_job(session, tenant=tenant)
    first, second, third = webhooks.due(session, [endpoint.id])
    for delivery, status in ((first, 200), (second, 503)):
        claim = webhooks.claim(session, delivery)
        webhooks.record(session, claim, Tried(status=status, error=None, took_s=0.5, try_again_s=9.0), actor="tests")
    webhooks.note_speed(session, endpoint.id, is_slow=True)
    age = text("UPDATE webhook_deliveries SET created_at = clock_timestamp() - interval '30 s' WHERE id = :id")
    session.execute(age, {"id": third})

    [row] = rows_of(session, "webhooks_now", tenant)

    assert (row.endpoint_id, row.disabled_at, row.disabled_reason) == (endpoint.id, None, None)
    assert (row.pending, row.oldest_pending_s) == (2, pytest.approx(30, abs=10))
    assert (row.last_status, row.last_error, row.last_took_s, row.is_slow) == (503, None, 0.5, True)
    assert row.last_attempt_at is not None


def test_webhooks_now_keeps_a_disabled_endpoint_and_forgets_a_deleted_one(session):
    tenant = a_tenant(session)
    kept, deleted = an_endpoint(session, tenant), an_endpoint(session, tenant)
    webhooks.change(session, kept, actor="tests", enabled=False)
    webhooks.delete(session, deleted, actor="tests")
    session.flush()

    [row] = rows_of(session, "webhooks_now", tenant)

    assert (row.endpoint_id, row.pending, row.oldest_pending_s, row.last_attempt_at) == (kept.id, 0, None, None)
    assert (row.disabled_at is not None, row.disabled_reason) == (True, kept.disabled_reason)


def test_stored_files_by_tenant_says_what_of_its_limit_a_tenant_has_used(session):
    tenant, empty = a_tenant(session), a_tenant(session)
    tenant.max_stored_bytes = 200
    empty.max_stored_bytes = 0
    facts = {"mode": "RGB", "size_bytes": 50, "width_px": 1, "height_px": 1}
    kept = [
        files.keep(session, tenant_id=tenant.id, object_key=f"t/{name}", content_sha256=name, actor="tests", **facts)
        for name in ("one", "two", "three")
    ]
    files.erase(session, kept[0].id, tenant_id=tenant.id, actor="tests")
    session.flush()

    def seen(of):
        [row] = rows_of(session, "stored_files_by_tenant", of)
        return row.files, row.size_bytes, row.max_stored_bytes, row.used_ratio

    assert seen(tenant) == (2, 100, 200, Decimal("0.5"))
    assert seen(empty) == (0, 0, 0, None)


def test_usage_by_tenant_day_says_what_is_booked(session):
    tenant = a_tenant(session)
    own = {"tenant_id": tenant.id, "api_key_id": None, "currency": "EUR", "actor": "tests"}
    first, _ = (
        jobs.accept(session, params=resolved(), start_within_s=600, megapixel_steps=Decimal(amount), **own) for amount in ("1.5", "0.25")
    )
    hand_off(session, a_lease(session, first))
    store(session, first)

    [row] = rows_of(session, "usage_by_tenant_day", tenant)

    booked = (row.jobs_accepted, row.jobs_succeeded, row.reserved_megapixel_steps, row.settled_megapixel_steps)
    assert booked == (2, 1, Decimal("0.25"), Decimal("1.5"))
    assert (row.cost, row.abandoned_megapixel_steps) == (first.cost, 0)


def test_audit_partitions_ahead_counts_up_to_the_first_that_is_missing(database):
    with database.owner.connect() as connection:
        month = datetime.now(UTC).replace(day=1)
        for _ in range(3):
            month = (month + timedelta(days=32)).replace(day=1)
        connection.execute(text(f"DROP TABLE audit_events_{month:%Y_%m}"))

        ahead = connection.scalar(text("SELECT audit_partitions_ahead()"))
        connection.rollback()

    assert ahead == 2
