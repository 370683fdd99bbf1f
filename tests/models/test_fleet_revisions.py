"""The fleet's revisions: in order, append-only; and queued jobs that follow them."""

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from models import jobs, revisions
from models.database import transaction
from models.tables import Flow
from policy.failures import FailureCode
from policy.revisions import QueuedKind
from tests.builders import a_job, a_lease, a_tenant, fleet_text
from tests.models.conftest import a_database


@pytest.fixture(scope="module")
def own(stack):
    """A database of its own: revisions can never be taken back."""
    with a_database(stack.env) as database:
        yield database


def applied(own, changes=None, **more) -> tuple[int, bool]:
    with transaction(own.app) as session:
        content = fleet_text(changes or {"currency": "EUR"})
        revision, is_new = revisions.apply(session, content, actor="somebody", **more)
        return revision.number, is_new


def test_a_text_that_is_in_force_is_no_new_revision(own):
    first, _ = applied(own)
    again, is_new = applied(own)

    assert (again, is_new) == (first, False)


def test_an_older_text_is_a_new_revision_that_names_its_origin(own):
    first, _ = applied(own)
    second, _ = applied(own, {"currency": "CHF"})
    third, is_new = applied(own, rollback_of=first, note="as before")

    with transaction(own.app) as session:
        newest = revisions.newest(session)
        assert newest is not None
        assert (newest.rollback_of, newest.note) == (first, "as before")
        assert newest.content == revisions.find(session, first).content
        assert [row.number for row in revisions.history(session, most=2)] == [third, second]
    assert is_new
    assert first < second < third


def test_a_revision_that_is_not_there_is_told_by_its_number(own):
    with transaction(own.app) as session, pytest.raises(revisions.NoRevision, match="revision 999"):
        revisions.find(session, 999)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE fleet_revisions SET content = ''",
        "DELETE FROM fleet_revisions",
        "TRUNCATE fleet_revisions",
    ],
)
def test_nobody_changes_what_was_applied_not_even_the_owner(own, statement):
    applied(own)

    with pytest.raises(DBAPIError, match="append-only"), own.owner.begin() as connection:
        connection.execute(text(statement))


def queued(session, pool: str) -> dict[str, int]:
    rows = session.execute(select(Flow.tier, Flow.queued_jobs).where(Flow.pool == pool))
    return {tier: count for tier, count in rows if count}


def test_a_moved_job_is_counted_in_its_new_pool_and_is_last_of_its_tenant_there(own):
    with transaction(own.app) as session:
        tenant = a_tenant(session)
        there = a_job(session, tenant=tenant, pool="there", predicted_s=3.0)
        job = a_job(session, tenant=tenant, pool="here", predicted_s=2.0)

        moved = jobs.move(session, job.id, "there")

        assert moved is not None
        assert (moved.pool, moved.announced_at) == ("there", None)
        assert moved.release_tag > there.release_tag
        assert queued(session, "here") == {}
        assert queued(session, "there") == {job.tier: 2}
        session.rollback()


def test_a_job_that_a_worker_has_neither_moves_nor_fails(own):
    with transaction(own.app) as session:
        lease = a_lease(session)

        assert jobs.move(session, lease.job_id, "there") is None
        gone = {"code": FailureCode.MODEL_GONE, "detail": "it is gone"}
        assert jobs.fail_gone(session, lease.job_id, **gone) is None
        session.rollback()


def test_queued_jobs_are_counted_by_what_they_need_of_the_fleet(own):
    with transaction(own.app) as session:
        tenant = a_tenant(session)
        uses = [{"name": name, "strength": 0.5} for name in ("ink", "gold")]
        job = a_job(session, tenant=tenant, pool="counted", adapters=uses)
        kind = revisions.kind_of(session, job)
        assert kind == QueuedKind(
            "counted", "pocket", "1", "fast", tenant.name, 128, 128, "ddim", ("ink", "gold")
        )
        assert kind not in revisions.queued_kinds(session), "that of a process with its own file"
        job.fleet_revision = 1
        session.flush()

        assert revisions.queued_kinds(session)[kind] == 1
        assert revisions.queued_of(session, kind, most=10) == [job.id]
        session.rollback()
