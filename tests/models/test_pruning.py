"""What is too old goes for good, with all that belongs to it, and the audit log that is left
verifies as before.
"""

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

from models import files, jobs, pruning
from models.database import make_engine, transaction
from models.ids import first_id
from models.tables import IdempotencyKey, Job, UsageDay, WebhookEndpoint, WebhookSecret
from policy.params import PICTURES
from tests.builders import a_job, a_succeeded_job, a_tenant, an_artifact
from tests.models.conftest import a_database

LONG_AGO = timedelta(days=100)
CUTOFF = datetime.now(UTC) - timedelta(days=30)
CHANGED, MISSING = (
    "the event was changed: its hash does not fit its content",
    "events are missing before this one",
)
FORGED = "the checkpoints of pruned months were changed"
AUGUST, SEPTEMBER, OCTOBER = date(2001, 8, 1), date(2001, 9, 1), date(2001, 10, 1)


@pytest.fixture(scope="module")
def own_database(stack) -> Iterator:
    """One whose months no other test looks at."""
    with a_database(stack.env) as database:
        yield database


@pytest.fixture
def owner(own_database) -> Iterator:
    """The owner, with the timeouts that a command of ours has."""
    engine = make_engine(own_database.owner_url, pool_size=2)
    yield engine
    engine.dispose()


@pytest.fixture
def months(own_database) -> Iterator[None]:
    """Partitions for three months of long ago."""
    with own_database.owner.begin() as connection:
        for month in (AUGUST, SEPTEMBER, OCTOBER):
            ends = (month + timedelta(days=32)).replace(day=1)
            bounds = f"FROM ('{month} 00:00+00') TO ('{ends} 00:00+00')"
            connection.execute(
                text(
                    f"CREATE TABLE {pruning.partition_of(month)} PARTITION OF audit_events "
                    f"FOR VALUES {bounds}"
                )
            )
    yield
    with own_database.owner.begin() as connection:
        for month in (AUGUST, SEPTEMBER, OCTOBER):
            connection.execute(text(f"DROP TABLE IF EXISTS {pruning.partition_of(month)}"))
        for table in ("audit_events", "audit_chains", "audit_checkpoints"):
            connection.execute(text("SET LOCAL session_replication_role = replica"))
            connection.execute(text(f"DELETE FROM {table}"))


_EVENT = text(
    """INSERT INTO audit_events (id, at, chain_id, seq, event, actor, facts, prev_hash, hash)
       VALUES (gen_random_uuid(), :at, :chain, 0, 'test:thing:happened', 'tests', '{}', '', '')"""
)


def append(database, chain, *months):
    """An event in each of these months, in this order."""
    with transaction(database.app) as session:
        for number, month in enumerate(months):
            session.execute(
                _EVENT,
                {"at": datetime(month.year, month.month, 3, 0, number, tzinfo=UTC), "chain": chain},
            )


def verify(database, chain=None) -> list[tuple[str, int, str]]:
    with database.auditor.connect() as connection:
        rows = connection.execute(text("SELECT * FROM audit_verify(:chain)"), {"chain": chain})
        return [(row.chain_id, row.seq, row.problem) for row in rows]


def prune_month(owner, month) -> int:
    with transaction(owner) as session:
        return pruning.prune_audit_month(session, month)


@pytest.fixture
def chains(own_database, months) -> None:
    """`busy` has events in every month, `idle` in August alone.

    In `late` some came in another order than that of their instants.
    """
    append(own_database, "busy", AUGUST, AUGUST, SEPTEMBER, OCTOBER, OCTOBER)
    append(own_database, "idle", AUGUST, AUGUST)
    append(
        own_database, "late", AUGUST, SEPTEMBER, AUGUST, SEPTEMBER, SEPTEMBER, OCTOBER, SEPTEMBER
    )
    append(own_database, "new", OCTOBER)


def test_the_log_verifies_after_each_month_that_is_pruned(own_database, owner, chains):
    assert verify(own_database) == []

    for month, events in ((AUGUST, 6), (SEPTEMBER, 5), (OCTOBER, 4)):
        assert prune_month(owner, month) == events
        assert verify(own_database) == []
        assert verify(own_database, "late") == verify(own_database, "idle") == []

    append(own_database, "idle", OCTOBER)
    append(own_database, "busy", OCTOBER)
    assert verify(own_database) == []


def test_months_can_be_pruned_in_any_order(own_database, owner, chains):
    for month in (SEPTEMBER, AUGUST):
        prune_month(owner, month)
        assert verify(own_database) == []


def test_a_pruned_month_is_told_by_an_event(own_database, owner, chains):
    prune_month(owner, AUGUST)

    with own_database.auditor.connect() as connection:
        facts = connection.scalar(
            text("SELECT facts FROM audit_log WHERE event = 'audit:month:pruned'")
        )
    assert (facts["month"], facts["events"]) == ("2001-08", 6)


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        ("DELETE FROM audit_events WHERE chain_id = 'busy' AND seq = 3", ("busy", 4, MISSING)),
        (
            "UPDATE audit_events SET actor = 'x' WHERE chain_id = 'busy' AND seq = 4",
            ("busy", 4, CHANGED),
        ),
        ("DELETE FROM audit_checkpoints WHERE chain_id = 'busy'", ("busy", 3, MISSING)),
        (
            "DELETE FROM audit_checkpoints WHERE chain_id = 'idle'",
            ("idle", 2, "the newest events are missing"),
        ),
        (
            "UPDATE audit_checkpoints SET hash = '\\x00' WHERE chain_id = 'busy'",
            ("busy", 3, "the link to the event before is broken"),
        ),
        ("DELETE FROM audit_checkpoints WHERE chain_id = 'busy'", ("system", 1, FORGED)),
        (  # a hole that is passed off as something that was pruned
            "WITH gone AS (DELETE FROM audit_events WHERE chain_id = 'busy' AND seq = 4 "
            "RETURNING chain_id, seq, hash)\n"
            "               INSERT INTO audit_checkpoints SELECT * FROM gone",
            ("system", 1, FORGED),
        ),
        (
            "DELETE FROM audit_events WHERE chain_id = 'system'",
            ("system", None, FORGED),
        ),
    ],
)
def test_a_pruned_log_still_tells_every_change_to_what_is_left_of_it(
    own_database, owner, chains, edit, found
):
    prune_month(owner, AUGUST)

    with Session(own_database.owner) as session:
        session.execute(text("SET LOCAL session_replication_role = replica"))  # no trigger fires
        session.execute(text(edit))
        problems = [
            (row.chain_id, row.seq, row.problem)
            for row in session.execute(text("SELECT * FROM audit_verify()"))
        ]
        session.rollback()

    assert found in problems


def test_a_log_can_be_verified_from_an_instant_on(own_database, chains):
    def since(instant) -> list[tuple[str, int, str]]:
        query = text("SELECT * FROM audit_verify_since(:since)")
        return [
            (row.chain_id, row.seq, row.problem)
            for row in session.execute(query, {"since": instant})
        ]

    september, october = (
        datetime(month.year, month.month, 1, tzinfo=UTC) for month in (SEPTEMBER, OCTOBER)
    )
    with Session(own_database.owner) as session:
        assert since(september) == since(october) == []

        session.execute(text("SET LOCAL session_replication_role = replica"))
        session.execute(
            text("UPDATE audit_events SET actor = 'x' WHERE chain_id = 'busy' AND seq = 1")
        )
        assert since(september) == []
        session.execute(text("DELETE FROM audit_events WHERE chain_id = 'busy' AND seq = 2"))
        assert since(september) == [("busy", 3, MISSING)]
        assert since(october) == []
        session.rollback()


def test_a_month_that_is_not_over_is_not_pruned(own_database, owner):
    this_month = datetime.now(UTC).date().replace(day=1)

    with pytest.raises(DBAPIError, match="is not over"):
        prune_month(owner, this_month)


def test_nobody_but_the_owner_prunes(own_database, chains):
    for engine in (own_database.app, own_database.auditor):
        with pytest.raises(DBAPIError, match="permission denied"):
            prune_month(engine, AUGUST)


def test_pruning_stops_nobody_who_appends_whoever_reads_the_log(own_database, owner, chains):
    with own_database.auditor.connect() as reader, ThreadPoolExecutor(1) as other:
        reader.execute(text("SELECT count(*) FROM audit_log"))
        pruned = other.submit(prune_month, owner, AUGUST)

        while not pruned.done():
            with transaction(own_database.app) as session:
                session.execute(text("SET LOCAL lock_timeout = '1s'"))
                session.execute(_EVENT, {"at": datetime.now(UTC), "chain": "busy"})

        with pytest.raises(OperationalError, match="lock timeout"):
            pruned.result()
    assert prune_month(owner, AUGUST) == 6
    assert verify(own_database) == []


def test_only_months_that_ended_before_are_due(own_database, owner, months):
    with transaction(owner) as session:
        assert pruning.audit_months(session, before=OCTOBER) == [AUGUST, SEPTEMBER]
        assert pruning.audit_months(session, before=OCTOBER - timedelta(days=1)) == [AUGUST]


# Jobs and files


def age(session, job, by: timedelta = LONG_AGO) -> uuid.UUID:
    """Make the job one of long ago, its id included, for ids are times."""
    old = first_id(datetime.now(UTC) - by).int | (job.id.int & (1 << 80) - 1)
    job_id, old_id = job.id, uuid.UUID(int=old)
    session.execute(text("SET LOCAL session_replication_role = replica"))
    for table, column in [
        ("jobs", "id"),
        *((table, "job_id") for table in ("job_labels", *pruning.OF_A_JOB)),
    ]:
        session.execute(
            text(f"UPDATE {table} SET {column} = :new WHERE {column} = :old"),
            {"new": old_id, "old": job_id},
        )
    for column in pruning.NAME_ANOTHER_JOB:
        session.execute(
            text(f"UPDATE jobs SET {column} = :new WHERE {column} = :old"),
            {"new": old_id, "old": job_id},
        )
    moved = "accepted_at = accepted_at - :age, finished_at = finished_at - :age"
    session.execute(text(f"UPDATE jobs SET {moved} WHERE id = :id"), {"id": old_id, "age": by})
    session.execute(text("SET LOCAL session_replication_role = DEFAULT"))
    session.expunge_all()
    return old_id


def prune_all(owner, *, tier=None, limit=2) -> int:
    """How many jobs went, a few at a time."""
    removed, after = 0, pruning.FIRST_ID
    while after is not None:
        with transaction(owner) as session:
            piece = pruning.prune_jobs(session, before=CUTOFF, after=after, limit=limit, tier=tier)
        removed, after = removed + piece.jobs, piece.last_id
    return removed


def count(session, table, **where) -> int:
    condition = " AND ".join(f"{column} = :{column}" for column in where)
    return session.scalar(text(f"SELECT count(*) FROM {table} WHERE {condition}"), where)


def test_a_job_goes_with_everything_that_belongs_to_it_and_its_objects(own_database, owner):
    key = an_artifact()["object_key"]
    with transaction(owner) as session:
        tenant = a_tenant(session)
        endpoint = WebhookEndpoint(
            tenant_id=tenant.id, url="https://example.com", events=["job.succeeded"]
        )
        session.add(endpoint)
        session.flush()
        job = a_succeeded_job(session, tenant=tenant, num_images=2, tenant_metadata={"set": "x"})
        session.execute(
            text("UPDATE artifacts SET object_key = :key WHERE job_id = :id AND index = 0"),
            {"key": key, "id": job.id},
        )
        session.add(IdempotencyKey(tenant_id=tenant.id, key="k", request_sha256="", job_id=job.id))
        replay = a_job(session, tenant=tenant)
        session.execute(
            text("UPDATE jobs SET replay_of = :old, requeue_of = :old WHERE id = :id"),
            {"old": job.id, "id": replay.id},
        )
        session.flush()
        assert count(session, "webhook_deliveries", job_id=job.id) == 1
        old_id, tenant_id, replay_id = age(session, job), tenant.id, replay.id

    assert prune_all(owner) == 1

    with transaction(owner) as session:
        for table in (*pruning.OF_A_JOB, "job_labels"):
            assert count(session, table, job_id=old_id) == 0, table
        assert count(session, "jobs", id=old_id) == 0
        left = session.get(Job, replay_id)
        assert (left.state, left.replay_of, left.requeue_of) == ("queued", None, None)
        given_up = text("SELECT started_at = to_timestamp(0) FROM uploads WHERE object_key = :key")
        assert session.scalar(given_up, {"key": key})
        of_tenant = text("SELECT event, facts FROM audit_events WHERE chain_id = :id ORDER BY seq")
        events = session.execute(of_tenant, {"id": str(tenant_id)}).all()
        assert (events[-1].event, events[-1].facts["jobs"]) == ("tenant:jobs:pruned", 1)
    assert verify(own_database, str(tenant_id)) == []


def test_every_table_that_names_a_job_is_known_to_pruning(own_database):
    query = """SELECT conrelid::regclass::text,
                      (SELECT attname FROM pg_attribute
                       WHERE attrelid = conrelid AND attnum = conkey[1])
               FROM pg_constraint WHERE contype = 'f' AND confrelid = 'jobs'::regclass"""
    with own_database.owner.connect() as connection:
        names = {(str(table), column) for table, column in connection.execute(text(query))}

    assert names == {(table, "job_id") for table in pruning.OF_A_JOB} | {
        ("jobs", column) for column in pruning.NAME_ANOTHER_JOB
    }


def test_every_reference_to_what_is_pruned_is_found_by_an_index(own_database):
    """Or each row that goes has Postgres read a whole table."""
    query = """
        SELECT c.conrelid::regclass::text || '.' || a.attname FROM pg_constraint c
        JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = c.conkey[1]
        WHERE c.contype = 'f' AND c.confrelid IN
              ('jobs'::regclass, 'files'::regclass, 'artifacts'::regclass,
               'webhook_endpoints'::regclass)
        AND NOT EXISTS (
            SELECT FROM pg_index i WHERE i.indrelid = c.conrelid AND i.indkey[0] = c.conkey[1]
            AND (i.indpred IS NULL
                 OR pg_get_expr(i.indpred, i.indrelid) = '(' || a.attname || ' IS NOT NULL)'))
    """
    with own_database.owner.connect() as connection:
        assert connection.scalars(text(query)).all() == []


def test_jobs_that_are_young_unfinished_or_of_another_tier_stay(owner):
    with transaction(owner) as session:
        tenant = a_tenant(session)
        young = a_succeeded_job(session, tenant=tenant).id
        unfinished = age(session, a_job(session, tenant=tenant))
        of_tier = age(
            session,
            jobs.cancel(
                session,
                a_job(session, tenant=tenant, tier="batch").id,
                tenant_id=tenant.id,
                actor="tests",
            ),
        )
        other = age(
            session,
            jobs.cancel(
                session,
                a_job(session, tenant=tenant, tier="fast").id,
                tenant_id=tenant.id,
                actor="tests",
            ),
        )

    assert prune_all(owner, tier="batch") == 1

    with transaction(owner) as session:
        assert [
            count(session, "jobs", id=job_id) for job_id in (young, unfinished, of_tier, other)
        ] == [1, 1, 0, 1]
        due = pruning.due(session, before=CUTOFF)
        assert due.jobs >= 1
    assert prune_all(owner) >= 1


def test_a_job_that_is_just_being_replayed_waits_for_the_next_pruning(owner):
    with transaction(owner) as session:
        tenant = a_tenant(session)
        old = age(
            session,
            jobs.cancel(
                session, a_job(session, tenant=tenant).id, tenant_id=tenant.id, actor="tests"
            ),
        )

    with transaction(owner) as replay:
        jobs.lock_against_erasure(replay, old)
        assert prune_all(owner) == 0
    assert prune_all(owner) == 1

    with pytest.raises(jobs.JobErased), transaction(owner) as session:
        jobs.lock_against_erasure(session, old)


@pytest.mark.parametrize("column", [param.name for param in PICTURES.values()])
def test_a_file_that_no_job_starts_from_is_erased_and_a_day_later_forgotten(owner, column):
    with transaction(owner) as session:
        tenant = a_tenant(session)
        pictures = [
            files.keep(
                session,
                tenant_id=tenant.id,
                object_key=f"t/{number}/{uuid.uuid4()}",
                mode="RGB",
                size_bytes=10,
                width_px=8,
                height_px=8,
                content_sha256=str(uuid.uuid4()),
                actor="tests",
            )
            for number in range(3)
        ]
        unused, used, young = (picture.id for picture in pictures)
        begins = {} if column == "control_file_id" else {"init_file_id": young, "strength": 0.5}
        a_job(session, tenant=tenant, **begins | {column: used})
        session.execute(
            text("UPDATE files SET created_at = created_at - :age WHERE id <> :young"),
            {"age": LONG_AGO, "young": young},
        )

    def prune() -> list[int]:
        with transaction(owner) as session:
            pruning.prune_files(session, before=CUTOFF, limit=100)
            pruning.forget_files(session, before=CUTOFF, limit=100)
        with transaction(owner) as session:
            return [count(session, "files", id=file_id) for file_id in (unused, used, young)]

    assert prune() == [1, 1, 1]
    with transaction(owner) as session:
        assert session.scalar(
            text("SELECT erased_at IS NOT NULL FROM files WHERE id = :id"), {"id": unused}
        )
        assert files.find(session, used, tenant_id=tenant.id) is not None
        session.execute(
            text("UPDATE files SET erased_at = erased_at - interval '2 days' WHERE id = :id"),
            {"id": unused},
        )
    assert prune() == [0, 1, 1]


def test_endpoints_that_were_deleted_long_ago_and_old_days_of_the_ledger_go(owner):
    with transaction(owner) as session:
        tenant = a_tenant(session)
        gone, live = (
            WebhookEndpoint(tenant_id=tenant.id, url="https://example.com", events=[])
            for _ in range(2)
        )
        gone.secrets = [WebhookSecret(secret="whsec_x")]
        session.add_all([gone, live])
        session.flush()
        gone.deleted_at = datetime.now(UTC) - LONG_AGO
        today = datetime.now(UTC).date()
        session.add_all(
            [
                UsageDay(tenant_id=tenant.id, day=day)
                for day in (today - timedelta(days=900), today - timedelta(days=10))
            ]
        )
        session.flush()
        ids = [gone.id, live.id]

    with transaction(owner) as session:
        pruning.prune_endpoints(session, before=CUTOFF, limit=100)
        pruning.prune_usage(session, before=today - timedelta(days=800))

    with transaction(owner) as session:
        assert [count(session, "webhook_endpoints", id=endpoint_id) for endpoint_id in ids] == [
            0,
            1,
        ]
        assert count(session, "usage_ledger", tenant_id=tenant.id) == 1
        newest = session.execute(
            text(
                "SELECT event, facts FROM audit_events WHERE chain_id = 'system' "
                "ORDER BY seq DESC LIMIT 1"
            )
        ).one()
        assert (newest.event, newest.facts["days"]) == ("usage:days:pruned", 1)


def test_the_audit_chains_of_several_tenants_are_locked_in_their_order(owner):
    """So two who append to the same ones never wait for each other in a circle."""
    with transaction(owner) as session:
        made = [a_tenant(session) for _ in range(6)]
        for number, tenant in enumerate(reversed(made)):  # the newest tenant has the oldest job
            age(session, a_succeeded_job(session, tenant=tenant))
            digest = f"{number:064x}"
            shape = {"mode": "RGB", "size_bytes": 10, "width_px": 8, "height_px": 8}
            own = {"tenant_id": tenant.id, "object_key": f"t/{digest}", "content_sha256": digest}
            files.keep(session, **own, **shape, actor="tests")
        chains = sorted(str(tenant.id) for tenant in made)
        moved = text("UPDATE files SET created_at = created_at - :age WHERE tenant_id = ANY(:ids)")
        session.execute(moved, {"age": LONG_AGO, "ids": [tenant.id for tenant in made]})

    with transaction(owner) as session:
        pruning.prune_jobs(session, before=CUTOFF, limit=100)
    with transaction(owner) as session:
        pruning.prune_files(session, before=CUTOFF, limit=100)

    appended = text(
        """SELECT chain_id FROM audit_events
           WHERE event = :event AND actor = 'operator' AND chain_id = ANY(:chains) ORDER BY at"""
    )
    with transaction(owner) as session:
        for event in ("tenant:jobs:pruned", "file:content:erased"):
            named = {"event": event, "chains": chains}
            assert session.scalars(appended, named).all() == chains, event
