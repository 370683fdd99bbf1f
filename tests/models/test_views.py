"""What the SQL views say: each of them row by row, and rules that a few rows do not show.

Rows are read in a session that is not in UTC, as an operator's may be.
"""

import hashlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from models import audit, files, inputs, jobs, leases, revisions, tenants, webhooks, workers
from models.tables import File, ObjectiveCount, ObjectiveTarget, Tenant
from models.webhooks import AttemptResult
from models.workers import NewWorker
from policy.failures import FailureCode
from tests.builders import (
    a_job,
    a_lease,
    a_succeeded_job,
    a_tenant,
    a_zone_of_another_day,
    hand_off,
    resolved,
    store,
)
from tests.models import cost_rows

Rows = Sequence[Mapping[str, Any]]
DAY = datetime(2026, 3, 1, tzinfo=UTC)
NEAR = pytest.approx  # seconds of this machine's own


def change(session: Session, table: str, where: str, **values: Any) -> None:
    """Give rows what only time would give them."""
    told = ", ".join(f"{name} = :{name}" for name in values)
    session.execute(text(f"UPDATE {table} SET {told} WHERE {where}"), values)
    session.expire_all()


def ago(session: Session, seconds: float) -> datetime:
    now = session.scalar(text("SELECT clock_timestamp()"))
    return now - timedelta(seconds=seconds)


def keep_files(session: Session, tenant: Tenant, *sizes_bytes: int) -> list[File]:
    """Pictures that the tenant brought."""
    shape = {"mode": "RGB", "width_px": 8, "height_px": 8, "actor": "tests"}
    kept = []
    for number, size_bytes in enumerate(sizes_bytes):
        digest = f"{number:064x}"
        own = {"tenant_id": tenant.id, "content_sha256": digest, "object_key": f"t/{digest}"}
        kept.append(files.keep(session, **own, **shape, size_bytes=size_bytes))
    return kept


def job_history(session, tenant) -> Rows:
    roles = ("init_file_id", "mask_file_id", "control_file_id")
    pictures = (file.id for file in keep_files(session, tenant, 1, 2, 3))
    wish = {
        "model_alias": "small",
        **dict(zip(roles, pictures, strict=True)),
        "strength": 0.5,
        "adapters": [{"name": "ink", "weight": 0.75}],
        "clip_skip": 1,
    }
    job = a_job(
        session,
        tenant=tenant,
        tier="quality",
        num_images=2,
        determinism="reproducible",
        bucket_rows=8,
        negative_prompt="blue",
        tenant_metadata={"order": "12"},
        **wish,
    )
    inputs.note_brought(session, job.id)
    leases.count_error(session, a_lease(session, job, worker="gpu1@b"), detail="no", max_attempts=5)
    lease = a_lease(session, job, worker="gpu0@a")
    tokens = {"prompt_tokens": 30, "truncated_tokens": 8}
    hand_off(session, lease, 0, steps=4, shared_steps=3, max_rows=6, max_images=2, **tokens)
    told = {"max_rows": 4, "max_images": 5, "suspect": "black"}
    hand_off(session, lease, 1, steps=4, shared_steps=1, **told, **tokens)
    store(session, job, 0, attempt=2)
    store(session, job, 1, attempt=2)
    instants = {
        "accepted_at": DAY,
        "started_at": DAY + timedelta(seconds=1.5),
        "rendered_at": DAY + timedelta(seconds=4),
        "finished_at": DAY + timedelta(seconds=4.25),
    }
    change(session, "jobs", f"id = '{job.id}'", **instants)
    return [
        {
            "job_id": job.id,
            "tenant": tenant.name,
            "state": "succeeded",
            "tier": "quality",
            "pool": "local",
            "model": "pocket",
            "model_version": "1",
            "prompt": "a red circle",
            "negative_prompt": "blue",
            "size": "128x128",
            "num_steps": 4,
            "guidance": 4.0,
            "sampler": "ddim",
            "seed": 7,
            "num_images": 2,
            "output_format": "png",
            "precision": "fp32",
            "determinism": "reproducible",
            "bucket_rows": 8,
            **instants,
            "queue_s": Decimal("1.5"),
            "render_s": Decimal("2.5"),
            "store_s": Decimal("0.25"),
            "total_s": Decimal("4.25"),
            "attempts": 2,
            "worker": "gpu0@a",
            "device": "cpu",
            "max_batch_images": 5,
            "max_batch_rows": 6,
            "steps_run": 8,
            "steps_shared": 4,
            "gpu_seconds": Decimal("1.0"),
            "cost": job.cost,
            "currency": "EUR",
            "failure_code": None,
            "failure_detail": None,
            "images_stored": 2,
            "steps_abandoned": 0,
            "fleet_revision": None,
            "request_id": None,
            "traceparent": None,
            "images_suspect": 1,
            "metadata": {"order": "12"},
            **wish,
            **tokens,
        }
    ]


def dead_letters(session, tenant) -> Rows:
    job = a_job(session, tenant=tenant, tier="batch")
    for worker in ("gpu1@b", "gpu0@a"):
        lease = a_lease(session, job, worker=worker)
        leases.count_error(session, lease, detail=f"{worker} said no", max_attempts=2)
    canceled = a_job(session, tenant=tenant)
    jobs.cancel(session, canceled.id, tenant_id=tenant.id, actor="tests")
    again = jobs.requeue_dead(session, job.id, start_within_s=600, actor="tests")
    session.refresh(job)
    return [
        {
            "job_id": job.id,
            "tenant": tenant.name,
            "pool": "local",
            "tier": "batch",
            "model": "pocket",
            "failure_code": "attempts_exhausted",
            "last_error": "gpu0@a said no",
            "attempts": 2,
            "counted_attempts": 2,
            "workers": "gpu0@a gpu1@b",
            "outcomes": "error error",
            "accepted_at": job.accepted_at,
            "finished_at": job.finished_at,
            "requeued_as": again.id,
        }
    ]


def queue_now(session, tenant) -> Rows:
    """Of a pool with the tenant's name, for the view tells no tenant."""
    own = {"tenant": tenant, "pool": tenant.name}
    waiting = [a_job(session, **own, num_images=number) for number in (1, 2)]
    announced = a_job(session, **own, num_images=4)
    a_lease(session, **own, num_images=8)
    a_lease(session, **own, tier="batch", num_images=3)
    late = a_job(session, **own, tier="batch")
    hand_off(session, a_lease(session, **own, num_images=1))
    hand_off(session, a_lease(session, **own, tier="quality"))
    a_succeeded_job(session, **own)
    change(session, "jobs", f"id = '{announced.id}'", announced_at=ago(session, 5))
    change(session, "jobs", f"id = '{waiting[1].id}'", accepted_at=ago(session, 90))
    change(session, "jobs", f"id = '{late.id}'", accepted_at=ago(session, 300))
    beats = {"pool": tenant.name, "device": "cpu", "slots": 8, "facts": {}}
    for name, silent_after_s in (("live", 15.0), ("patient", 60.0), ("silent", 15.0)):
        name = f"{name}@{tenant.name}"
        workers.heartbeat(session, name=name, **beats, silent_after_s=silent_after_s)
    change(session, "workers", f"name = 'silent@{tenant.name}'", seen_at=ago(session, 20))
    change(session, "workers", f"name = 'patient@{tenant.name}'", seen_at=ago(session, 20))
    place = {"pool": tenant.name, "live_workers": 2}
    batch = {"waiting": 1, "announced": 0, "running": 1, "storing": 0, "images": 4}
    fast = {"waiting": 2, "announced": 1, "running": 1, "storing": 1, "images": 16}
    quality = {"waiting": 0, "announced": 0, "running": 0, "storing": 1, "images": 1}
    return [
        {**place, "tier": "batch", **batch, "oldest_wait_s": NEAR(Decimal(300), abs=Decimal(30))},
        {**place, "tier": "fast", **fast, "oldest_wait_s": NEAR(Decimal(90), abs=Decimal(30))},
        {**place, "tier": "quality", **quality, "oldest_wait_s": None},
    ]


def audit_log(session, tenant) -> Rows:
    job = a_job(session, tenant=tenant)
    leases.fail(session, a_lease(session, job), code=FailureCode.NOT_FINITE, detail="NaN")
    query = """SELECT seq, id, at, facts,
                      encode(prev_hash, 'hex') AS prev, encode(hash, 'hex') AS hash
               FROM audit_events WHERE chain_id = :id ORDER BY seq"""
    stored = session.execute(text(query), {"id": str(tenant.id)}).all()
    own = {"chain": tenant.name, "attempt": None, "job_id": job.id, "actor": "tests"}
    accepted = "model=pocket model_version=1 num_images=1 pool=local seed=7 tier=fast"
    words = [
        {"event": "tenant:record:created", "job_id": None, "facts_text": f"tenant_id={tenant.id}"},
        {"event": "job:request:accepted", "facts_text": accepted},
        {"event": "job:lease:taken", "actor": "gpu0@here", "attempt": 1, "facts_text": None},
        {
            "event": "job:state:failed",
            "actor": "gpu0@here",
            "attempt": 1,
            "facts_text": "code=not_finite",
        },
    ]
    rows = [
        {
            "seq": row.seq,
            "event_id": row.id,
            "at": row.at,
            "facts": row.facts,
            "prev_hash": row.prev,
            "hash": row.hash,
        }
        for row in stored
    ]
    assert [row["seq"] for row in rows] == [1, 2, 3, 4]
    return [{**own, **row, **said} for row, said in zip(rows, words, strict=True)]


def audit_chain_status(session, tenant) -> Rows:
    a_job(session, tenant=tenant)
    query = "SELECT encode(hash, 'hex') FROM audit_events WHERE chain_id = :id AND seq = 2"
    head = session.scalar(text(query), {"id": str(tenant.id)})
    return [{"chain": tenant.name, "chain_id": str(tenant.id), "events": 2, "head": head}]


def images_by_tenant_day(session, tenant) -> Rows:
    """One image just after a UTC midnight, one just before the next, one on the day after."""
    lease = a_lease(session, tenant=tenant, num_images=3)
    at = (timedelta(minutes=30), timedelta(hours=23, minutes=30), timedelta(days=1, hours=12))
    for index, device_seconds in enumerate((0.5, 1.0, 2.5)):
        hand_off(session, lease, index, device_seconds=device_seconds)
        store(session, lease.job, index)
        where = f"job_id = '{lease.job_id}' AND index = {index}"
        change(session, "artifacts", where, created_at=DAY + at[index])
    a_succeeded_job(session)
    own = {"tenant": tenant.name, "tier": "fast", "model": "pocket", "currency": "EUR"}
    first = {"images": 2, "size_bytes": 2000, "gpu_seconds": Decimal("1.5")}
    second = {"images": 1, "size_bytes": 1000, "gpu_seconds": Decimal("2.5")}
    assert lease.job.cost == Decimal("0.002667")
    return [
        {**own, "day": date(2026, 3, 1), **first, "cost": Decimal("0.001000")},
        {**own, "day": date(2026, 3, 2), **second, "cost": Decimal("0.001667")},
    ]


def flows_now(session, tenant) -> Rows:
    """Of two tenants in a pool of their own; one has weight 2."""
    tenants.set_weight(session, tenant, weight=2.0, actor="tests")
    other = a_tenant(session)
    for owner, count in ((tenant, 3), (other, 1)):
        for _ in range(count):
            own = {"tenant": owner, "pool": tenant.name, "num_images": 2}
            a_job(session, **own, predicted_s=4.04)
    a_lease(session, tenant=a_tenant(session), pool=tenant.name)  # it runs, and waits no more
    first = text("SELECT min(release_tag) FROM jobs WHERE pool = :pool")
    start = session.scalar(first, {"pool": tenant.name})
    clock = {"pool": tenant.name, "tier": "fast", "virtual_s": start}
    session.execute(text("INSERT INTO fair_clocks VALUES (:pool, :tier, :virtual_s)"), clock)
    place = {"pool": tenant.name, "tier": "fast"}
    mine = {"weight": 2.0, "queued_jobs": 3, "queued_images": 6}
    his = {"weight": 1.0, "queued_jobs": 1, "queued_images": 2}
    told = [
        {**place, "tenant": tenant.name, **mine, "queued_gpu_s": Decimal("12.1")},
        {**place, "tenant": other.name, **his, "queued_gpu_s": Decimal("4.0")},
    ]
    ahead = NEAR(Decimal("6.1"), abs=Decimal("0.5")), NEAR(Decimal("4.0"), abs=Decimal("0.5"))
    return sorted(
        ({**row, "ahead_s": s} for row, s in zip(told, ahead, strict=True)),
        key=lambda row: row["tenant"],
    )


def slo_attainment(session, tenant) -> Rows:
    """Of 1,000 jobs of the last hour 999 met it, and of as many a day ago 899."""
    own = {"tier": tenant.name, "objective": "final"}
    session.add(ObjectiveTarget(**own, target=0.95))
    for seconds, good in ((600, 999), (86_400, 899)):
        bucket = ago(session, seconds)
        session.add(ObjectiveCount(**own, bucket=bucket, good=good, total=1000))
    session.flush()
    recent = {"good": 999, "total": 1000, "attainment": Decimal("0.999")}
    longer = {"good": 1898, "total": 2000, "attainment": Decimal("0.949")}
    none = {"good": 0, "total": 0, "attainment": None}
    spans = {"1h": recent, "30d": longer, "30m": recent, "3d": longer, "5m": none, "6h": recent}
    burn_rates = {999: Decimal("0.020"), 1898: Decimal("1.020"), 0: None}
    return [
        {**own, "target": 0.95, "span": span, **row, "burn_rate": burn_rates[row["good"]]}
        for span, row in spans.items()
    ]


def stored_files_by_tenant(session, tenant) -> Rows:
    tenants.limit(session, tenant, changes={"max_stored_bytes": 1000}, actor="tests")
    *_, erased = keep_files(session, tenant, 100, 150, 700)
    files.erase(session, erased.id, tenant_id=tenant.id, actor="tests")
    return [
        {
            "tenant": tenant.name,
            "files": 2,
            "size_bytes": 250,
            "max_stored_bytes": 1000,
            "used_ratio": Decimal("0.2500"),
        }
    ]


def usage_by_tenant_day(session, tenant) -> Rows:
    def accept(megapixel_steps: str):
        own = {"tenant_id": tenant.id, "api_key_id": None, "currency": "EUR", "actor": "tests"}
        counts = Decimal(megapixel_steps)
        return jobs.accept(
            session,
            jobs.NewJob(params=resolved(), start_within_s=60, megapixel_steps=counts),
            **own,
        )

    accept("0.5")
    done, taken_back = accept("0.25"), accept("1.0")
    hand_off(session, a_lease(session, done))
    store(session, done)
    hand_off(session, a_lease(session, taken_back), num_steps=taken_back.num_steps)
    jobs.cancel(session, taken_back.id, tenant_id=tenant.id, actor="tests")
    today = session.scalar(text("SELECT (clock_timestamp() AT TIME ZONE 'UTC')::date"))
    assert today == datetime.now(UTC).date()
    return [
        {
            "day": today,
            "tenant": tenant.name,
            "jobs_accepted": 3,
            "jobs_succeeded": 1,
            "reserved_megapixel_steps": Decimal("0.5"),
            "settled_megapixel_steps": Decimal("0.25"),
            "cost": done.cost,
            "abandoned_megapixel_steps": Decimal("1.0"),
        }
    ]


def webhooks_now(session, tenant) -> Rows:
    """One endpoint that failed, one that was never tried, one disabled, and one deleted."""
    waiting_of = text("SELECT id FROM webhook_deliveries WHERE endpoint_id = :id ORDER BY id")
    shape = {"events": ["job.canceled"], "description": "", "secret": "whsec_AAAA"}

    def an_endpoint():
        url = "https://example.com/"
        made = webhooks.create(session, tenant_id=tenant.id, url=url, **shape, actor="tests")
        session.flush()
        return made

    tried, disabled, deleted = an_endpoint(), an_endpoint(), an_endpoint()
    for _ in range(2):
        job = a_job(session, tenant=tenant)
        jobs.cancel(session, job.id, tenant_id=tenant.id, actor="tests")
    session.flush()
    webhooks.delete(session, deleted, actor="tests")
    webhooks.change(session, disabled, enabled=False, actor="tests")
    idle = an_endpoint()
    oldest, newest = session.scalars(waiting_of, {"id": tried.id})
    _, since = session.scalars(waiting_of, {"id": disabled.id})
    for delivery_id, status in ((newest, 503), (oldest, 204), (newest, 500)):
        change(session, "webhook_deliveries", f"id = '{delivery_id}'", due_at=ago(session, 1))
        claim = webhooks.claim(session, delivery_id)
        outcome = AttemptResult(status=status, error=None, took_s=status / 1000, try_again_s=60.0)
        webhooks.record(session, claim, outcome, actor="courier")
    change(session, "webhook_deliveries", f"id = '{newest}'", created_at=ago(session, 90))
    change(session, "webhook_deliveries", f"id = '{since}'", created_at=ago(session, 300))
    webhooks.note_speed(session, tried.id, is_slow=True)
    session.flush()
    session.refresh(disabled)
    last = ("last_attempt_at", "last_status", "last_error", "last_took_s")
    nothing = dict.fromkeys(last)
    live = {"tenant": tenant.name, "disabled_at": None, "disabled_reason": None, "is_slow": False}
    never = {**live, **nothing, "pending": 0, "oldest_pending_s": None}
    long = NEAR(Decimal(300), abs=Decimal(30))
    off = {"disabled_at": disabled.disabled_at, "disabled_reason": "by the tenant"}
    failed_at = session.scalar(
        text("SELECT at FROM webhook_attempts WHERE delivery_id = :id AND attempt = 2"),
        {"id": newest},
    )
    failed = {"last_attempt_at": failed_at, "last_status": 500, "last_error": None}
    waits = {"pending": 1, "oldest_pending_s": NEAR(Decimal(90), abs=Decimal(30))}
    rows = {
        tried.id: {**live, **failed, **waits, "last_took_s": 0.5, "is_slow": True},
        disabled.id: {**never, **off, "pending": 2, "oldest_pending_s": long},
        idle.id: never,
    }
    return [{"endpoint_id": id, **rows[id]} for id in sorted(rows, key=str)]


def fleet_history(session, tenant) -> Rows:
    """One revision, and its text in force again after another one; the tenant's name applies."""
    texts = ["a = 1", "a = 2", "a = 1"]
    applied = [
        revisions.apply(session, f"{each} # {tenant.name}", actor=tenant.name, **more)[0]
        for each, more in zip(texts, ({"note": "first"}, {}, {"rollback_of": 1}), strict=True)
    ]
    return [
        {
            "number": one.number,
            "applied_at": one.applied_at,
            "actor": tenant.name,
            "note": one.note,
            "rollback_of": one.rollback_of,
            "sha256": hashlib.sha256(one.content.encode()).hexdigest(),
            "content": one.content,
        }
        for one in applied
    ]


def workers_now(session, tenant) -> Rows:
    """Of a pool with the tenant's name: one that lacks a model, one in vain, one that is silent."""
    pool = tenant.name
    beats = {"pool": pool, "device": "cpu", "facts": {}}
    why = {"y@1": "model 'y' is broken", "z@1": "model 'z', too"}
    workers.heartbeat(
        session, name=f"a@{pool}", slots=8, **beats, held=["x@1", "x@2"], loaded=["x@2"], failed=why
    )
    workers.heartbeat(session, name=f"b@{pool}", slots=8, **beats)
    change(session, "workers", f"name = 'b@{pool}'", seen_at=ago(session, 20))
    starts = [
        NewWorker(
            name=f"c@{pool}",
            pool=pool,
            device="cuda:0",
            instance=uuid.uuid4(),
            host="there",
            pid=number,
        )
        for number in (1, 2)
    ]
    for start in starts:
        workers.claim(session, start, silent_after_s=15)
        workers.fail(session, start.name, start.instance, "there is nothing to load")
    started = session.execute(
        text("SELECT name, started_at FROM workers WHERE pool = :pool"), {"pool": pool}
    )
    times = {row.name: row.started_at for row in started}
    usual = {"pool": pool, "device": "cpu", "slots": 8, "restarts": 0, "failed_starts": 0}
    usual |= {"capacity_class": ""}
    empty = ("models", "loaded", "failed_models", "problem")
    empty += ("host", "pid", "fleet_revision", "waits_for", "doing")
    unknown = dict.fromkeys(empty)
    here = NEAR(Decimal(0), abs=Decimal(15))
    return [
        {
            **usual,
            **unknown,
            "worker": f"a@{pool}",
            "state": "ready",
            "models": "x@1 x@2",
            "loaded": "x@2",
            "failed_models": "y@1 z@1",
            "problem": "model 'y' is broken; model 'z', too",
            "started_at": times[f"a@{pool}"],
            "silent_s": here,
        },
        {
            **usual,
            **unknown,
            "worker": f"b@{pool}",
            "state": "silent",
            "started_at": times[f"b@{pool}"],
            "silent_s": NEAR(Decimal(20), abs=Decimal(15)),
        },
        {
            **usual,
            "worker": f"c@{pool}",
            "state": "failed",
            "device": "cuda:0",
            "slots": 0,
            "models": "",
            "loaded": "",
            "failed_models": None,
            "problem": "there is nothing to load",
            "restarts": 1,
            "failed_starts": 1,
            "host": "there",
            "pid": 2,
            "fleet_revision": None,
            "waits_for": None,
            "doing": None,
            "started_at": times[f"c@{pool}"],
            "silent_s": here,
        },
    ]


# By view: what is made, and how its rows are found and ordered. All are found by the tenant's name.
CONTENTS: dict[str, tuple[Callable[[Session, Tenant], Rows], str, str]] = {
    "audit_chain_status": (audit_chain_status, "chain", "chain"),
    "audit_log": (audit_log, "chain", "seq"),
    "costs_by_pool_day": (cost_rows.costs_by_pool_day, "pool", "day"),
    "costs_by_tenant_day": (cost_rows.costs_by_tenant_day, "tenant", "day"),
    "dead_letters": (dead_letters, "tenant", "job_id"),
    "device_time_by_hour": (cost_rows.device_time_by_hour, "pool", "hour"),
    "fleet_history": (fleet_history, "actor", "number"),
    "flows_now": (flows_now, "pool", "tenant"),
    "images_by_tenant_day": (images_by_tenant_day, "tenant", "day"),
    "job_history": (job_history, "tenant", "job_id"),
    "queue_now": (queue_now, "pool", "tier"),
    "slo_attainment": (slo_attainment, "tier", "span"),
    "stored_files_by_tenant": (stored_files_by_tenant, "tenant", "tenant"),
    "usage_by_tenant_day": (usage_by_tenant_day, "tenant", "day"),
    "wasted_time_by_day": (cost_rows.wasted_time_by_day, "tenant", "waste_class"),
    "webhooks_now": (webhooks_now, "tenant", "endpoint_id"),
    "workers_now": (workers_now, "pool", "worker"),
}


def test_every_view_of_the_database_is_read_here(database):
    query = "SELECT viewname FROM pg_views WHERE schemaname = 'public'"
    with database.owner.connect() as connection:
        assert set(connection.scalars(text(query))) == set(CONTENTS)


@pytest.mark.parametrize("view", CONTENTS)
def test_a_view_says_what_is_so(database, view):
    """Written by the owner, who may read the tables that the rows are compared with."""
    prepare, key, order = CONTENTS[view]
    with Session(database.owner, expire_on_commit=False) as session:
        session.execute(text(f"SET LOCAL TIME ZONE '{a_zone_of_another_day()}'"))
        tenant = tenants.create(session, name=f"t-{uuid.uuid4().hex[:12]}", actor="tests")
        expected = prepare(session, tenant)
        session.flush()

        query = f'SELECT * FROM {view} WHERE "{key}" = :name ORDER BY "{order}"'
        rows = session.execute(text(query), {"name": tenant.name}).mappings().all()
        session.rollback()

    assert len(rows) == len(expected)
    assert [dict(row) for row in rows] == list(expected)


def rows_of(session: Session, view: str, tenant: Tenant) -> list[Any]:
    """The tenant's rows, as the application sees them."""
    query = text(f"SELECT * FROM {view} WHERE tenant = :name")
    return list(session.execute(query, {"name": tenant.name}))


def test_job_history_adds_up_the_attempts_of_a_job(session):
    tenant = a_tenant(session)
    job = a_job(session, tenant=tenant)
    first = a_lease(session, job, worker="gpu0@here")
    leases.count_error(session, first, detail="no", max_attempts=5)
    change(session, "attempts", f"job_id = '{job.id}'", steps=3, max_rows=9)
    hand_off(session, a_lease(session, job, worker="gpu1@there"), steps=4, max_rows=2)

    [row] = rows_of(session, "job_history", tenant)

    assert (row.attempts, row.worker, row.steps_run, row.max_batch_rows) == (2, "gpu1@there", 7, 9)


@pytest.mark.parametrize(("end", "abandoned"), [("canceled", 4), ("failed", 0)])
def test_job_history_counts_steps_as_abandoned_only_where_taken_back(session, end, abandoned):
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

    run = (row.device, row.steps_run, row.max_batch_images)
    assert (row.state, row.attempts, *run) == ("queued", 0, None, 0, 0)
    assert (row.queue_s, row.render_s, row.store_s, row.total_s) == (None,) * 4


def test_images_by_tenant_day_shares_the_cost_out_by_device_time_and_keeps_tiers_apart(session):
    tenant = a_tenant(session)
    lease = a_lease(session, tenant=tenant, num_images=2)
    for index, device_seconds in ((0, 0.25), (1, 0.75)):
        hand_off(session, lease, index, device_seconds=device_seconds)
        store(session, lease.job, index)
    batch = a_succeeded_job(session, tenant=tenant, tier="batch")

    rows = {row.tier: row for row in rows_of(session, "images_by_tenant_day", tenant)}

    assert rows.keys() == {"fast", "batch"}
    fast, slow = rows["fast"], rows["batch"]
    assert (fast.images, fast.size_bytes, slow.images, slow.size_bytes) == (2, 2000, 1, 1000)
    assert (fast.gpu_seconds, fast.cost) == (Decimal("1.000"), lease.job.cost)
    assert (slow.gpu_seconds, slow.cost) == (Decimal("0.500"), batch.cost)
    today = ago(session, 0).astimezone(UTC).date()
    told = {(row.model, row.currency, row.day) for row in rows.values()}
    assert told == {("pocket", "EUR", today)}


def test_images_by_tenant_day_shares_the_cost_out_evenly_without_device_time(session):
    """Of two days, one with two images; a stranger's are counted with none of them."""
    tenant = a_tenant(session)
    lease = a_lease(session, tenant=tenant, num_images=3)
    for index in lease.pending:
        hand_off(session, lease, index, device_seconds=0.0)
        store(session, lease.job, index)
    today = ago(session, 0)
    where = f"job_id = '{lease.job_id}' AND index = 2"
    change(session, "artifacts", where, created_at=today - timedelta(days=1))
    change(session, "jobs", f"id = '{lease.job_id}'", cost=Decimal("0.000300"))
    a_succeeded_job(session)

    rows = rows_of(session, "images_by_tenant_day", tenant)

    costs = {row.images: row.cost for row in rows}
    assert costs == {2: Decimal("0.000200"), 1: Decimal("0.000100")}
    assert [row.gpu_seconds for row in rows] == [0, 0]


def test_images_by_tenant_day_has_no_cost_where_the_price_is_nothing(session):
    tenant = a_tenant(session)
    lease = a_lease(session, tenant=tenant)
    hand_off(session, lease, 0, device_seconds=0.0)
    store(session, lease.job, 0)

    [row] = rows_of(session, "images_by_tenant_day", tenant)

    assert row.cost == lease.job.cost == 0


def test_stored_files_are_no_part_of_a_limit_of_nothing(session):
    tenant = a_tenant(session)
    tenants.limit(session, tenant, changes={"max_stored_bytes": 0}, actor="tests")

    [row] = rows_of(session, "stored_files_by_tenant", tenant)

    assert (row.files, row.size_bytes, row.max_stored_bytes, row.used_ratio) == (0, 0, 0, None)


def test_the_audit_log_leaves_long_facts_to_the_whole_of_them(session):
    tenant = a_tenant(session)
    facts = {"b": 2, "a": "x", "long": "y" * 65}
    named = {"chain": tenant.id, "actor": "tests", "attempt": 3}
    audit.append(session, "test:thing:happened", **named, **facts)

    query = text("SELECT * FROM audit_log WHERE chain = :name ORDER BY seq")
    created, happened = session.execute(query, {"name": tenant.name}).all()

    assert (happened.facts_text, happened.attempt, happened.facts) == ("a=x b=2", 3, facts)
    assert happened.prev_hash == created.hash
