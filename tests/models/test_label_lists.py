"""Lists of a tenant's jobs by metadata.

In order, complete, and never longer at work than for so many looks into an index.
"""

import uuid

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from models import erasing, jobs, listing
from models.listing import JobFilter
from tests.builders import a_job, a_tenant


def some_jobs(session, tenant, *labels):
    """A job with each of these labels, oldest first."""
    return [a_job(session, tenant=tenant, tenant_metadata=own) for own in labels]


def a_walk(session, tenant, job_filter, *, limit=2):
    """Ids of all pages, and how many pages there were."""
    ids, pages, before = [], 0, job_filter.before
    while True:
        page = listing.page(
            session,
            JobFilter(job_filter.since, before, job_filter.state, job_filter.metadata),
            tenant_id=tenant.id,
            limit=limit,
        )
        ids += [job.id for job in page.jobs]
        pages += 1
        if page.more_before is None and len(page.jobs) < limit:
            return ids, pages
        before = page.more_before or page.jobs[-1].id


@pytest.mark.parametrize("probes", [listing.MOST_PROBES, 4, 3])
def test_a_list_by_metadata_is_complete_however_short_each_page_s_work_is(
    session, monkeypatch, probes
):
    monkeypatch.setattr(listing, "MOST_PROBES", probes)
    tenant, stranger = a_tenant(session), a_tenant(session)
    both, one, other = {"set": "x", "user": "1"}, {"set": "x"}, {"set": "y", "user": "1"}
    made = some_jobs(session, tenant, both, one, one, other, both, one, other, None, both)
    some_jobs(session, stranger, both, both)
    newest_first = [job.id for job in reversed(made)]
    has_both = [made[8].id, made[4].id, made[0].id]

    assert a_walk(session, tenant, JobFilter(metadata=both))[0] == has_both
    with_x = {job.id for job in made if job.tenant_metadata and job.tenant_metadata["set"] == "x"}
    assert a_walk(session, tenant, JobFilter(metadata=one))[0] == [
        job_id for job_id in newest_first if job_id in with_x
    ]
    assert a_walk(session, tenant, JobFilter(metadata={"set": "z"}))[0] == []
    assert a_walk(session, tenant, JobFilter(metadata=both, before=made[8].id, since=made[4].id))[
        0
    ] == [made[4].id]


def test_a_list_by_metadata_can_be_of_one_state(session):
    tenant = a_tenant(session)
    made = some_jobs(session, tenant, *[{"set": "x"}] * 4)
    jobs.cancel(session, made[1].id, tenant_id=tenant.id, actor="tests")

    assert a_walk(session, tenant, JobFilter(state="canceled", metadata={"set": "x"}))[0] == [
        made[1].id
    ]
    assert a_walk(session, tenant, JobFilter(state="failed", metadata={"set": "x"}))[0] == []


def test_a_page_s_work_is_bounded_where_two_frequent_labels_have_nothing_in_common(
    session, monkeypatch
):
    monkeypatch.setattr(listing, "MOST_PROBES", 10)
    tenant = a_tenant(session)
    some_jobs(session, tenant, *[{"a": "1"}, {"b": "1"}] * 20)

    page = listing.page(
        session, JobFilter(metadata={"a": "1", "b": "1"}), tenant_id=tenant.id, limit=5
    )
    found, pages = a_walk(session, tenant, JobFilter(metadata={"a": "1", "b": "1"}), limit=5)

    assert (page.jobs, page.more_before is not None) == ([], True)
    assert (found, pages > 2) == ([], True)


def test_a_job_whose_metadata_were_erased_is_in_no_list_by_them(session):
    tenant = a_tenant(session)
    (job,) = some_jobs(session, tenant, {"set": "x"})

    erasing.erase(session, job.id, tenant_id=tenant.id, actor="tests")

    assert (
        listing.page(session, JobFilter(metadata={"set": "x"}), tenant_id=tenant.id, limit=5).jobs
        == []
    )
    assert (
        session.scalar(text("SELECT count(*) FROM job_labels WHERE job_id = :id"), {"id": job.id})
        == 0
    )


def test_a_list_by_metadata_reads_no_job_of_another_tenant(session):
    """Whoever else has the same metadata, and however many jobs with them."""
    plan = session.scalars(
        text(
            "EXPLAIN SELECT job_id FROM job_labels WHERE tenant_id = :id AND label = :id "
            "AND job_id <= :id ORDER BY job_id DESC LIMIT 1"
        ),
        {"id": uuid.uuid4()},
    ).all()

    assert any("Index Only Scan Backward using job_labels_pkey" in line for line in plan), plan


def test_a_page_by_metadata_has_no_more_jobs_than_were_asked_for(session):
    tenant = a_tenant(session)
    made = some_jobs(session, tenant, *[{"set": "x"}] * 5)

    page = listing.page(session, JobFilter(metadata={"set": "x"}), tenant_id=tenant.id, limit=2)

    assert [job.id for job in page.jobs] == [made[4].id, made[3].id]


def test_a_job_that_is_listed_under_a_label_it_has_not_is_not_found_by_it(database):
    """As one whose label has the same digest would be."""
    add = text(
        "INSERT INTO job_labels SELECT tenant_id, label, :other FROM job_labels WHERE job_id = :id"
    )
    with Session(database.owner, expire_on_commit=False) as session:
        tenant = a_tenant(session)
        made = some_jobs(session, tenant, {"set": "x"}, {"set": "y"})
        session.execute(add, {"id": made[0].id, "other": made[1].id})

        page = listing.page(session, JobFilter(metadata={"set": "x"}), tenant_id=tenant.id, limit=5)

        assert [job.id for job in page.jobs] == [made[0].id]
        session.rollback()


def test_a_label_tells_where_its_key_ends(database):
    with database.owner.connect() as connection:
        assert (
            connection.scalar(text("SELECT job_label('a', 'bc') = job_label('ab', 'c')")) is False
        )


def test_of_jobs_that_are_named_a_tenant_is_given_its_own(session):
    own, stranger = a_job(session), a_job(session)

    found = listing.find_many(session, [own.id, stranger.id, uuid.uuid4()], tenant_id=own.tenant_id)

    assert found == {own.id: own}
