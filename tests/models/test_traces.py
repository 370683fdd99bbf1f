"""A trace has a span for each time that a job spent, and none for what did not happen."""

import uuid

import pytest

from models import jobs, leases, traces
from tests.builders import a_job, a_lease, hand_off, preempt, store


def names(session, job) -> list[str]:
    session.flush()
    session.expire_all()
    return [span.name for span in traces.of_job(session, job.id).spans]


def test_job_that_nobody_has_begun_waits_in_line(session):
    job = a_job(session)

    assert names(session, job) == ["job", "wait in line"]
    assert traces.of_job(session, job.id).spans[1].end is None


def test_job_that_another_worker_goes_on_with_has_a_wait_between_two_attempts(session):
    lease = a_lease(session)
    preempt(session, lease)
    job = lease.job
    assert names(session, job) == ["job", "wait in line", "attempt 1", "wait in line"]

    hand_off(session, a_lease(session, job))
    store(session, job, attempt=2)

    assert names(session, job) == [
        "job",
        "wait in line",
        "attempt 1",
        "wait in line",
        "attempt 2",
        "store image 0",
    ]


@pytest.mark.parametrize("how", ["canceled", "failed"])
def test_job_that_ends_with_its_attempt_waits_no_more(session, how):
    lease = a_lease(session)
    if how == "canceled":
        jobs.cancel(session, lease.job_id, tenant_id=lease.job.tenant_id, actor="tests")
    else:
        leases.fail(session, lease, code="internal", detail="no")

    assert names(session, lease.job) == ["job", "wait in line", "attempt 1"]


def test_there_is_no_trace_of_no_job(session):
    assert traces.of_job(session, uuid.uuid4()) is None
