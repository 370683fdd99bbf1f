"""Why a job failed, as its tenant hears of it: our own faults keep their insides to themselves."""

import json
import uuid
from datetime import UTC, datetime
from types import SimpleNamespace

from app.openai.answers import problem_of_end
from models import jobs, leases
from models.database import transaction
from policy.failures import FailureCode
from tasks.deliver import message

INSIDES = "gpu7@rack-3: RuntimeError in /srv/engine/runner.py"
OURS_ALONE = {FailureCode.ATTEMPTS_EXHAUSTED, FailureCode.INTERNAL}


def fail(database, job, code):
    """End the job as a worker does; everything that its row says of it comes back."""
    with transaction(database) as session:
        lease = leases.take(session, uuid.UUID(job["id"]), worker="tests", device="cpu", ttl_s=60)
        if code is FailureCode.ATTEMPTS_EXHAUSTED:
            row = leases.count_error(session, lease, detail=INSIDES, max_attempts=1)
        else:
            row = leases.fail(session, lease, code=code, detail=INSIDES)
        assert (row.state, row.failure_code, row.failure_detail) == ("failed", code, INSIDES)
        return jobs.find(session, row.id, tenant_id=row.tenant_id)


def told_by_events(tenant, job):
    stream = tenant.read(job["urls"]["events"])
    return json.loads(stream.partition("event: final\ndata: ")[2].partition("\n")[0])["failure"]


def test_failure_detail_is_told_only_where_the_tenant_can_do_something(a_house, stack_database):
    tenant = a_house().with_workers().tenant()
    made = {code: tenant.post(n=1).json for code in FailureCode}
    for code, job in made.items():
        fail(stack_database, job, code)

    listed = {job["id"]: job["failure"] for job in json.loads(tenant.read("/v1/jobs"))["data"]}
    for code, job in made.items():
        failure = {"code": code, "detail": None if code in OURS_ALONE else INSIDES}
        assert tenant.get(job)["failure"] == failure
        assert tenant.get(job, "status")["failure"] == failure
        assert tenant.get(job)["progress"] is None, "nothing came of it"
        assert told_by_events(tenant, job) == failure
        assert listed[job["id"]] == failure


def test_failure_detail_is_no_part_of_webhooks_and_told_by_openai_s_answers(
    a_house, stack_database
):
    tenant = a_house().with_workers().tenant()

    for code in FailureCode:
        row = fail(stack_database, tenant.post(n=1).json, code)
        told = message(SimpleNamespace(event="job.failed"), row, datetime.now(UTC))
        problem = problem_of_end(row.id, row.state, row.failure_code, row.failure_detail)

        assert told["data"]["failure"] == {"code": code}
        assert INSIDES not in json.dumps(told)
        assert (INSIDES in json.dumps(problem.summary())) is (code not in OURS_ALONE)
