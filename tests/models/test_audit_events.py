"""Every audit event: what appends it, to whose chain, in whose name and with which facts."""

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from models import (
    api_keys,
    budgets,
    erasing,
    files,
    jobs,
    leases,
    pruning,
    quarantine,
    revisions,
    tenants,
    webhooks,
)
from models.ids import first_id
from models.tables import Tenant, UsageDay, WebhookEndpoint
from models.webhooks import AttemptResult
from policy.failures import FailureCode
from settings import REPO
from tests.builders import (
    WORKER,
    a_job,
    a_lease,
    a_left,
    a_succeeded_job,
    a_tenant,
    an_artifact,
    fleet_text,
    hand_off,
    preempt,
    spend,
    store,
)

ACTOR = "key:abc"  # whoever asked; the gateway names the key
SWEEPER = "sweeper"
BILL = {"images_stored", "settled", "abandoned", "cost", "currency"}
ENDPOINT = {"endpoint_id"}

# The facts of every event, by its name: whoever reads the log relies on them.
FACTS = {
    "api-key:secret:issued": {"api_key_id", "kid", "scopes"},
    "api-key:secret:revoked": {"api_key_id", "kid"},
    "api-key:secret:rotated": {"api_key_id", "kid", "successor"},
    "audit:month:pruned": {"month", "events", "checkpoints_sha256"},
    "device:quarantine:ended": {"device", "host"},
    "device:quarantine:started": {"device", "host"},
    "file:content:erased": {"file_id", "content_sha256"},
    "file:content:stored": {"file_id", "content_sha256", "size_bytes", "width_px", "height_px"},
    "fleet:revision:applied": {"number", "sha256"},
    "job:attempt:failed": {"counted_attempts", "outcome"},
    "job:content:erased": {"images"},
    "job:hand-off:lost": {"indexes"},
    "job:image:handed-off": {"index", "steps", "device_seconds", "fingerprint"},
    "job:image:stored": {"index", "artifact_id", "pixels_sha256", "content_sha256"},
    "job:lease:expired": {"counted_attempts", "outcome"},
    "job:lease:preempted": {"reason", "snapshots", "snapshot_bytes", "steps_done"},
    "job:lease:returned": {"reason"},
    "job:lease:taken": set(),
    "job:request:accepted": {"pool", "tier", "model", "model_version", "num_images", "seed"},
    "job:pool:changed": {"left", "pool"},
    "job:state:canceled": {"was"},
    "job:state:expired": set(),
    "job:state:failed": {"code"},
    "job:state:succeeded": {"device_seconds", "cost", "currency"},
    "job:text:left-unread": {"code", "field"},
    "job:work:abandoned": {"steps", "abandoned"},
    "tenant:budget:reached": {"month", "percent", "budget", "spent", "currency"},
    "tenant:jobs:pruned": {"jobs", "newest", "before"},
    "tenant:limits:changed": {"changes"},
    "tenant:record:created": {"tenant_id"},
    "tenant:weight:changed": {"was", "weight"},
    "usage:days:pruned": {"days", "before"},
    "webhook:delivery:redelivered": {"delivery_id", "endpoint_id"},
    "webhook:endpoint:changed": {"endpoint_id", "changed"},
    "webhook:endpoint:created": {"endpoint_id", "events"},
    "webhook:endpoint:deleted": ENDPOINT,
    "webhook:endpoint:disabled": {"endpoint_id", "reason"},
    "webhook:secret:rotated": ENDPOINT,
}
SPEAKS_OF_NO_JOB = {"tenant:jobs:pruned"}

Act = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """What is prepared and then done, and the events that come of that: (name, actor)."""

    prepare: Callable[[Session, Tenant], Act]
    events: tuple[tuple[str, str], ...]
    more_facts: frozenset[str]
    is_on_system: bool
    as_owner: bool


CASES: list[Case] = []


def appends(*names: str, actor=ACTOR, more_facts=(), is_on_system=False, as_owner=False):
    """The act that the function prepares appends these events, and no others."""

    def register(prepare: Callable[[Session, Tenant], Act]) -> Callable[[Session, Tenant], Act]:
        events = tuple((name, actor) for name in names)
        CASES.append(Case(prepare, events, frozenset(more_facts), is_on_system, as_owner))
        return prepare

    return register


def names_in_the_code() -> set[str]:
    """Every text of the form of an event's name, in quotes, in what is shipped."""
    rooms = ("app", "cli", "dispatch", "edges", "fleet", "migrations", "models", "policy", "tasks")
    sources = [path for room in rooms for path in (REPO / room).rglob("*.*")]
    texts = [path.read_text() for path in sources if path.suffix in (".py", ".sql")]
    name = re.compile(r"""['"]([a-z]+(?:-[a-z]+)*(?::[a-z]+(?:-[a-z]+)*){2})['"]""")
    return {found for source in texts for found in name.findall(source)}


def test_audit_events_of_the_code_are_those_that_are_tested_here():
    tested = {name for case in CASES for name, _ in case.events}

    assert names_in_the_code() == set(FACTS)
    assert tested == set(FACTS) - {"tenant:record:created"}  # each of them begins with that one


# Tenants and keys


@appends("tenant:weight:changed")
def weighing(session, tenant):
    return partial(tenants.set_weight, session, tenant, weight=2.0, actor=ACTOR)


@appends("tenant:budget:reached", actor=jobs.SWEEPER)
def spending(session, tenant):
    spend(session, tenant, budget=10, cost=5)
    return partial(budgets.note_reached_thresholds, session, currency="USD")


@appends("tenant:limits:changed")
def limiting(session, tenant):
    changes = {"requests_per_minute": 5, "daily_megapixel_steps": None}
    return partial(tenants.limit, session, tenant, changes=changes, actor=ACTOR)


def a_key(session, tenant):
    own = {"tenant_id": tenant.id, "name": "web", "pepper": "a pepper of many letters"}
    return api_keys.issue(session, **own, actor="tests")[0]


@appends("api-key:secret:issued")
def issuing(session, tenant):
    own = {"tenant_id": tenant.id, "name": "web", "pepper": "a pepper of many letters"}
    return partial(api_keys.issue, session, **own, actor=ACTOR)


@appends("api-key:secret:issued", "api-key:secret:rotated")
def rotating_a_key(session, tenant):
    key = a_key(session, tenant)
    return partial(api_keys.rotate, session, key.id, pepper="another", grace_s=60, actor=ACTOR)


@appends("api-key:secret:revoked")
def revoking(session, tenant):
    return partial(api_keys.revoke, session, a_key(session, tenant).id, actor=ACTOR)


@appends()
def revoking_twice(session, tenant):
    key = a_key(session, tenant)
    api_keys.revoke(session, key.id, actor="tests")
    return partial(api_keys.revoke, session, key.id, actor=ACTOR)


# Files


def a_picture(content="ab" * 32) -> dict[str, Any]:
    shape = {"mode": "RGB", "size_bytes": 100, "width_px": 8, "height_px": 8}
    return {"object_key": f"t/x/{content}", "content_sha256": content, **shape}


@appends("file:content:stored")
def keeping_a_file(session, tenant):
    return partial(files.keep, session, tenant_id=tenant.id, **a_picture(), actor=ACTOR)


@appends()
def keeping_a_file_that_is_there(session, tenant):
    files.keep(session, tenant_id=tenant.id, **a_picture(), actor="tests")
    return partial(files.keep, session, tenant_id=tenant.id, **a_picture(), actor=ACTOR)


@appends("file:content:erased")
def erasing_a_file(session, tenant):
    file = files.keep(session, tenant_id=tenant.id, **a_picture(), actor="tests")
    return partial(files.erase, session, file.id, tenant_id=tenant.id, actor=ACTOR)


# Webhooks


def an_endpoint(session, tenant) -> WebhookEndpoint:
    shape = {"url": "https://example.com/", "description": "", "secret": "whsec_AAAA"}
    events = ["job.canceled"]
    endpoint = webhooks.create(session, tenant_id=tenant.id, events=events, **shape, actor="tests")
    session.flush()
    return endpoint


def a_delivery(session, tenant) -> uuid.UUID:
    an_endpoint(session, tenant)
    job = a_job(session, tenant=tenant)
    jobs.cancel(session, job.id, tenant_id=tenant.id, actor="tests")
    session.flush()
    [delivery_id] = webhooks.due_of_job(session, job.id)
    return delivery_id


@appends("webhook:endpoint:created")
def adding_an_endpoint(session, tenant):
    shape = {"url": "https://example.com/", "description": "", "secret": "whsec_AAAA"}
    events = ["job.failed"]
    own = {"tenant_id": tenant.id, "events": events}
    return partial(webhooks.create, session, **own, **shape, actor=ACTOR)


@appends("webhook:endpoint:changed")
def changing_an_endpoint(session, tenant):
    endpoint = an_endpoint(session, tenant)
    return partial(webhooks.change, session, endpoint, url="https://example.org/", actor=ACTOR)


@appends("webhook:endpoint:deleted")
def deleting_an_endpoint(session, tenant):
    return partial(webhooks.delete, session, an_endpoint(session, tenant), actor=ACTOR)


@appends("webhook:secret:rotated")
def rotating_a_secret(session, tenant):
    endpoint = an_endpoint(session, tenant)
    return partial(webhooks.rotate, session, endpoint, secret="whsec_BBBB", grace_s=60, actor=ACTOR)


@appends("webhook:delivery:redelivered")
def redelivering(session, tenant):
    delivery_id = a_delivery(session, tenant)
    return partial(webhooks.redeliver, session, delivery_id, tenant_id=tenant.id, actor=ACTOR)


@appends("webhook:endpoint:disabled", actor="courier")
def hearing_that_a_receiver_is_gone(session, tenant):
    claim = webhooks.claim(session, a_delivery(session, tenant))
    gone = AttemptResult(status=410, error=None, took_s=0.1, try_again_s=5.0)
    return partial(webhooks.record, session, claim, gone, actor="courier")


@appends()
def failing_to_deliver(session, tenant):
    claim = webhooks.claim(session, a_delivery(session, tenant))
    away = AttemptResult(status=None, error="timeout", took_s=0.1, try_again_s=5.0)
    return partial(webhooks.record, session, claim, away, actor="courier")


# Jobs, as tenants and the gateway move them


@appends("job:request:accepted", actor="tests")
def accepting(session, tenant):
    return partial(a_job, session, tenant=tenant)


@appends("job:request:accepted", actor="tests", more_facts={"model_alias"})
def accepting_an_alias(session, tenant):
    return partial(a_job, session, tenant=tenant, model_alias="dall-e-3")


@appends("job:request:accepted", actor=ACTOR, more_facts={"requeue_of"})
def requeueing(session, tenant):
    lease = a_lease(session, tenant=tenant)
    leases.fail(session, lease, code=FailureCode.INTERNAL, detail="x")
    return partial(jobs.requeue_dead, session, lease.job_id, start_within_s=60, actor=ACTOR)


@appends("job:state:canceled")
def canceling(session, tenant):
    job = a_job(session, tenant=tenant)
    return partial(jobs.cancel, session, job.id, tenant_id=tenant.id, actor=ACTOR)


@appends("job:state:canceled", more_facts=BILL)
def canceling_what_is_stored_in_part(session, tenant):
    lease = a_lease(session, tenant=tenant, num_images=2)
    hand_off(session, lease, 0)
    store(session, lease.job, 0)
    return partial(jobs.cancel, session, lease.job_id, tenant_id=tenant.id, actor=ACTOR)


@appends()
def canceling_twice(session, tenant):
    job = a_job(session, tenant=tenant)
    jobs.cancel(session, job.id, tenant_id=tenant.id, actor="tests")
    return partial(jobs.cancel, session, job.id, tenant_id=tenant.id, actor=ACTOR)


@appends("job:state:canceled", "job:content:erased")
def erasing_a_job_under_way(session, tenant):
    job = a_job(session, tenant=tenant)
    return partial(erasing.erase, session, job.id, tenant_id=tenant.id, actor=ACTOR)


@appends("job:content:erased")
def erasing_a_job_that_ended(session, tenant):
    job = a_succeeded_job(session, tenant=tenant)
    return partial(erasing.erase, session, job.id, tenant_id=tenant.id, actor=ACTOR)


@appends()
def erasing_a_job_twice(session, tenant):
    job = a_succeeded_job(session, tenant=tenant)
    erasing.erase(session, job.id, tenant_id=tenant.id, actor="tests")
    return partial(erasing.erase, session, job.id, tenant_id=tenant.id, actor=ACTOR)


# Jobs, as workers move them


@appends("job:lease:taken", actor=WORKER)
def taking(session, tenant):
    return partial(a_lease, session, a_job(session, tenant=tenant))


@appends()
def renewing(session, tenant):
    lease = a_lease(session, tenant=tenant)
    held = [(lease.job_id, lease.attempt)]
    return partial(leases.renew, session, held, worker=WORKER, ttl_s=15)


@appends("job:image:handed-off", actor=WORKER)
def handing_off(session, tenant):
    return partial(hand_off, session, a_lease(session, tenant=tenant))


@appends("job:lease:returned", actor=WORKER)
def giving_back(session, tenant):
    return partial(leases.give_back, session, a_lease(session, tenant=tenant), reason="drain")


@appends("job:lease:preempted", actor=WORKER)
def preempting(session, tenant):
    return partial(preempt, session, a_lease(session, tenant=tenant), left=[a_left()])


@appends("job:text:left-unread", actor=WORKER)
def warning(session, tenant):
    warnings = [{"code": "cut", "field": "prompt", "detail": "what the tenant wrote"}]
    return partial(leases.warn, session, a_lease(session, tenant=tenant), warnings)


@appends("job:state:failed", actor=WORKER)
def failing(session, tenant):
    lease = a_lease(session, tenant=tenant)
    return partial(leases.fail, session, lease, code=FailureCode.NOT_FINITE, detail="NaN")


@appends("job:attempt:failed", actor=WORKER)
def erring(session, tenant):
    lease = a_lease(session, tenant=tenant)
    return partial(leases.count_error, session, lease, detail="no", max_attempts=2)


@appends("job:state:failed", actor=WORKER, more_facts={"counted_attempts", "outcome"})
def erring_once_too_often(session, tenant):
    lease = a_lease(session, tenant=tenant)
    return partial(leases.count_error, session, lease, detail="no", max_attempts=1)


@appends("job:work:abandoned", actor=WORKER)
def telling_of_work_on_a_canceled_job(session, tenant):
    lease = a_lease(session, tenant=tenant)
    jobs.cancel(session, lease.job_id, tenant_id=tenant.id, actor="tests")
    return partial(leases.note_waste, session, lease, device_seconds=0.1, steps_done={0: 2})


@appends()
def resuming(session, tenant):
    lease = a_lease(session, tenant=tenant)
    return partial(leases.note_resumption, session, lease, resumed={0: 2}, lost_steps=1)


# Jobs, as results workers and the sweeper move them


@appends("job:image:stored", actor="results")
def storing_one_of_two(session, tenant):
    lease = a_lease(session, tenant=tenant, num_images=2)
    hand_off(session, lease, 0)
    return partial(store, session, lease.job, 0)


@appends("job:image:stored", "job:state:succeeded", actor="results")
def storing_the_last(session, tenant):
    lease = a_lease(session, tenant=tenant)
    hand_off(session, lease)
    return partial(store, session, lease.job)


@appends("job:lease:expired", actor=SWEEPER)
def losing_a_lease(session, tenant):
    lease = a_lease(session, tenant=tenant, ttl_s=-1)
    return partial(leases.lose, session, lease.job_id, max_attempts=2)


@appends("job:lease:expired", actor=WORKER)
def losing_a_predecessor_s_lease(session, tenant):
    lease = a_lease(session, tenant=tenant)
    return partial(leases.lose, session, lease.job_id, max_attempts=2, worker=WORKER)


@appends("job:state:failed", actor=SWEEPER, more_facts={"counted_attempts", "outcome"})
def losing_the_last_lease(session, tenant):
    lease = a_lease(session, tenant=tenant, ttl_s=-1)
    return partial(leases.lose, session, lease.job_id, max_attempts=1)


@appends("job:hand-off:lost", actor=SWEEPER)
def losing_pixels(session, tenant):
    lease = a_lease(session, tenant=tenant)
    hand_off(session, lease)
    return partial(leases.lose_hand_off, session, lease.job_id, [0], attempt_of={0: 1})


@appends("job:state:expired", actor=SWEEPER)
def expiring(session, tenant):
    job = a_job(session, tenant=tenant, start_within_s=-1)
    return partial(jobs.expire, session, job.id)


@appends("job:pool:changed", actor=SWEEPER)
def moving_to_another_pool(session, tenant):
    return partial(jobs.move, session, a_job(session, tenant=tenant).id, "elsewhere")


@appends("job:state:failed", actor=SWEEPER)
def failing_for_want_of_its_model(session, tenant):
    job = a_job(session, tenant=tenant)
    return partial(jobs.fail_gone, session, job.id, code=FailureCode.MODEL_GONE, detail="gone")


@appends("job:state:failed", actor=SWEEPER)
def overrunning(session, tenant):
    job = a_job(session, tenant=tenant, run_within_s=0)
    leases.give_back(session, a_lease(session, job), reason="drain")
    return partial(jobs.fail_past_deadline, session, job.id)


# What the owner prunes


LONG_AGO = datetime(2001, 8, 15, tzinfo=UTC)


@appends("tenant:jobs:pruned", actor=pruning.ACTOR, as_owner=True)
def pruning_jobs(session, tenant):
    job = a_job(session, tenant=tenant)
    jobs.cancel(session, job.id, tenant_id=tenant.id, actor="tests")
    aged = {"id": job.id, "old": first_id(LONG_AGO), "at": LONG_AGO}
    session.execute(text("DELETE FROM images WHERE job_id = :id"), aged)
    session.execute(text("UPDATE jobs SET id = :old, finished_at = :at WHERE id = :id"), aged)
    return partial(pruning.prune_jobs, session, before=LONG_AGO + timedelta(days=1), limit=10)


@appends("file:content:erased", actor=pruning.ACTOR, as_owner=True)
def pruning_files(session, tenant):
    file = files.keep(session, tenant_id=tenant.id, **a_picture(), actor="tests")
    file.created_at = LONG_AGO
    session.flush()
    return partial(pruning.prune_files, session, before=LONG_AGO + timedelta(days=1), limit=10)


@appends("fleet:revision:applied", is_on_system=True)
def applying_a_fleet(session, tenant):
    return partial(revisions.apply, session, fleet_text({"currency": "EUR"}), actor=ACTOR)


@appends("usage:days:pruned", actor=pruning.ACTOR, is_on_system=True, as_owner=True)
def pruning_usage(session, tenant):
    session.add(UsageDay(tenant_id=tenant.id, day=LONG_AGO.date()))
    session.flush()
    return partial(pruning.prune_usage, session, before=date(2001, 9, 1))


@appends("audit:month:pruned", actor=pruning.ACTOR, is_on_system=True, as_owner=True)
def pruning_a_month(session, tenant):
    bounds = "FROM ('2001-08-01 00:00+00') TO ('2001-09-01 00:00+00')"
    partition = "CREATE TABLE audit_events_2001_08 PARTITION OF audit_events FOR VALUES"
    session.execute(text(f"{partition} {bounds}"))
    return partial(pruning.prune_audit_month, session, date(2001, 8, 1))


# Devices


def a_loss(**changes):
    own = {"device": "GPU-1", "worker": WORKER, "pool": "local", "capacity_class": ""}
    return quarantine.Loss(**own | {"host": "host-1", "pid": 1} | changes)


@appends()
def losing_a_device(session, tenant):
    return partial(quarantine.note_loss, session, a_loss(device="GPU-lost-once"))


@appends("device:quarantine:started", actor=WORKER, is_on_system=True)
def losing_a_device_twice(session, tenant):
    quarantine.note_loss(session, a_loss())
    return partial(quarantine.note_loss, session, a_loss())


@appends("device:quarantine:ended", is_on_system=True)
def releasing_a_device(session, tenant):
    quarantine.note_loss(session, a_loss(device="GPU-2"))
    quarantine.note_loss(session, a_loss(device="GPU-2"))
    return partial(quarantine.release, session, "GPU-2", actor=ACTOR)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.prepare.__name__)
def test_every_change_appends_its_audit_events_and_no_others(database, case):
    role = database.owner if case.as_owner else database.app
    with Session(role, expire_on_commit=False) as session:
        tenant = a_tenant(session)
        act = case.prepare(session, tenant)
        before = _ends_of_chains(session)

        act()

        session.flush()
        appended = _after(session, before)
        session.rollback()
    assert [(row.event, row.actor) for row in appended] == list(case.events)
    for row in appended:
        assert row.chain == ("system" if case.is_on_system else tenant.name)
        more = case.more_facts if row.event != "job:content:erased" else set()
        assert set(row.facts) == FACTS[row.event] | more
        is_of_job = row.event.startswith("job:") and row.event not in SPEAKS_OF_NO_JOB
        assert (row.job_id is not None) == is_of_job


def test_a_tenant_s_first_audit_event_is_its_own_record(session):
    tenant = tenants.create(session, name=f"t-{uuid.uuid4().hex[:12]}", actor=ACTOR)

    [row] = [row for row in _after(session, {}) if row.chain == tenant.name]

    assert (row.seq, row.event, row.actor) == (1, "tenant:record:created", ACTOR)
    assert row.facts == {"tenant_id": str(tenant.id)}


def test_audit_events_of_attempts_name_the_attempt(session):
    job = a_job(session)
    leases.count_error(session, a_lease(session, job), detail="no", max_attempts=5)
    lease = a_lease(session, job)
    hand_off(session, lease)
    store(session, job, attempt=2, artifact=an_artifact())

    query = text("SELECT event, attempt FROM audit_log WHERE job_id = :id ORDER BY seq")
    rows = session.execute(query, {"id": job.id})

    assert [tuple(row) for row in rows] == [
        ("job:request:accepted", None),
        ("job:lease:taken", 1),
        ("job:attempt:failed", 1),
        ("job:lease:taken", 2),
        ("job:image:handed-off", 2),
        ("job:image:stored", 2),
        ("job:state:succeeded", 2),
    ]


def test_audit_events_of_the_command_line_say_so(session):
    """Its commands name nobody: they are run by whoever has the database's password."""
    tenant = tenants.create(session, name=f"t-{uuid.uuid4().hex[:12]}")
    tenants.set_weight(session, tenant, weight=2.0)
    tenants.limit(session, tenant, changes={"url_inputs": True})
    row, _ = api_keys.issue(session, tenant_id=tenant.id, name="x", pepper="x" * 16)
    api_keys.rotate(session, row.id, pepper="x" * 16, grace_s=60)
    api_keys.revoke(session, row.id)

    rows = [row for row in _after(session, {}) if row.chain == tenant.name]

    assert ({row.actor for row in rows}, len(rows)) == ({"cli"}, 7)


def _ends_of_chains(session) -> dict[str, int]:
    return dict(session.execute(text("SELECT chain, events FROM audit_chain_status")).all())


def _after(session, before: dict[str, int]) -> list[Any]:
    """The events beyond these numbers, by chain and in order."""
    query = """SELECT chain, seq, event, actor, job_id, attempt, facts FROM audit_log
               ORDER BY chain, seq"""
    rows = session.execute(text(query)).all()
    return [row for row in rows if row.seq > before.get(row.chain, 0)]
