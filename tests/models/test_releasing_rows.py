"""The rows that a release reads are enough.

It picks what the rule would pick of everything that waits.
"""

import uuid
from collections import Counter

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from models import releasing
from models.tables import Job
from policy.release import Outstanding, ReleaseLimits, Selection, WaitingJob
from tests.builders import a_job, a_lease, a_tenant

LIMITS = st.builds(
    ReleaseLimits,
    slots=st.integers(1, 4),
    limit_images=st.integers(1, 6),
    least_share=st.integers(0, 4),
    max_per_tenant=st.none() | st.integers(1, 3),
)
STATES = (
    "waiting",
    "waiting",
    "waiting",
    "came back",
    "lacks its pictures",
    "announced",
    "running",
    "over",
)
JOBS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 3), st.sampled_from(STATES)), max_size=14
)


def make(session, pool, jobs) -> None:
    tenants = [a_tenant(session) for _ in range(3)]
    for owner, num_images, state in jobs:
        job = a_job(
            session,
            tenant=tenants[owner],
            pool=pool,
            num_images=num_images,
            predicted_s=float(num_images),
        )
        if state in ("running", "over"):
            a_lease(session, job)
        changes = {
            "came back": "attempt = 1",
            "lacks its pictures": "lacks_inputs = true",
            "announced": "announced_at = clock_timestamp()",
            "over": "state = 'canceled', finished_at = clock_timestamp(), lease_expires_at = NULL",
        }
        if state in changes:
            session.execute(
                text(f"UPDATE jobs SET {changes[state]} WHERE id = :id"), {"id": job.id}
            )


def read(session, pool) -> tuple[Outstanding, list[WaitingJob]]:
    """What is outstanding and what waits, counted over all rows of the pool."""
    there, line = Outstanding(), []
    session.expire_all()
    for job in session.query(Job).where(Job.pool == pool).order_by(Job.release_tag, Job.id):
        if job.state == "running":
            there.running[job.tenant_id] += job.num_images
            there.running_s += job.predicted_s
        if job.state == "running" or (job.state == "queued" and job.announced_at is not None):
            there.images[job.tenant_id] += job.num_images
            there.announced_jobs += job.state == "queued"
        elif job.state == "queued" and not job.lacks_inputs:
            line.append(
                WaitingJob(job.id, job.tenant_id, job.num_images, job.release_tag, job.attempt)
            )
    return there, line


def heads(line: list[WaitingJob], of_each: int) -> list[WaitingJob]:
    """The first so many of each tenant."""
    seen = Counter()
    kept = []
    for job in line:
        seen[job.tenant_id] += 1
        kept += [job] if seen[job.tenant_id] <= of_each else []
    return kept


@given(limits=LIMITS, jobs=JOBS)
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_release_picks_what_the_rule_picks_of_all_that_waits(session, limits, jobs):
    pool = f"pool-{uuid.uuid4().hex[:8]}"
    make(session, pool, jobs)
    there, line = read(session, pool)
    assert releasing.outstanding_in(session, pool=pool, tier="fast") == there
    assert releasing.outstanding_by_tier(session, pool=pool) == (
        {"fast": there} if there.images else {}
    )
    expected = Selection(there, limits)
    room = limits.limit_images - there.total_images
    if room > 0:  # under a cap a tenant's jobs beyond so many are not looked at
        cap = limits.max_per_tenant
        expected.take_in_order(line if cap is None else heads(line, min(room, cap)))
    if expected.leaves_out_some_of(line):
        expected.take_those_behind(heads(line, releasing.OF_EACH_TENANT))

    picked = releasing.pick(session, pool=pool, tier="fast", limits=limits)

    assert picked == list(expected.picked.values())
