"""Use cases without a request: a runtime and a caller are all they take."""

import uuid
from collections.abc import Iterator
from dataclasses import replace

import pytest
from sqlalchemy import event

from app.caller import Caller
from app.problems import FleetSaturated, JobNotFound
from app.runtime import Runtime, open_runtime
from app.services import jobs
from app.services.batches import submit_batch
from app.services.cancel import cancel, erase
from app.services.estimate import estimate
from app.services.replay import replay
from app.services.submit import JobRequest, Prepared, accept_once, prepare, submit
from models import api_keys, tenants
from models.database import transaction
from models.idempotency import Once
from policy.fleet import parse_fleet
from policy.limits import Limits
from policy.params import Wish
from policy.states import JobState
from settings import REPO, GatewaySettings
from tests.builders import settings_for

ASKED = JobRequest(Wish(prompt="a red circle", tier="batch", steps=4), pictures={}, metadata={"page": "7"})


@pytest.fixture(scope="module")
def runtime(stack) -> Iterator[Runtime]:
    """What a gateway process works with, and no Flask around it."""
    opened = open_runtime(settings_for(GatewaySettings, stack.env), parse_fleet((REPO / "fleet.toml").read_text()))
    yield opened
    opened.readiness.close()
    opened.endings.close()


@pytest.fixture
def caller(stack, stack_database) -> Caller:
    """A tenant that has nothing yet."""
    with transaction(stack_database) as session:
        tenant = tenants.create(session, name=f"app-{uuid.uuid4().hex[:8]}", actor="tests")
        row, _ = api_keys.issue(session, tenant_id=tenant.id, name="tests", pepper=stack.env["API_KEY_PEPPER"], actor="tests")
        return Caller(tenant.id, row.id, row.kid, f"key:{row.kid}", frozenset({"generate", "read"}), Limits())


def a_key() -> Once:
    return Once(uuid.uuid4().hex, "0" * 64)


def never() -> Prepared:
    raise AssertionError("nothing is prepared for a request that came before")


@pytest.fixture
def statements(runtime) -> Iterator[list[str]]:
    """What the runtime asks the database, one after the other."""
    seen: list[str] = []

    def note(connection, cursor, statement, *rest) -> None:
        seen.append(statement)

    event.listen(runtime.database, "before_cursor_execute", note)
    yield seen
    event.remove(runtime.database, "before_cursor_execute", note)


def test_a_job_lives_from_submit_to_erase_without_a_request(runtime, caller):
    job = submit(runtime, caller, ASKED).job

    assert jobs.find(runtime, caller, job.id).tenant_metadata == {"page": "7"}
    assert replay(runtime, caller, job.id).job.seed == job.seed
    assert cancel(runtime, caller, job.id).state == JobState.CANCELED
    erase(runtime, caller, job.id)
    assert jobs.find(runtime, caller, job.id).prompt == ""


def test_a_job_of_another_tenant_is_not_found_by_any_use_case(runtime, caller):
    stranger = replace(caller, tenant_id=uuid.uuid4())
    job = submit(runtime, caller, ASKED).job

    for use_case in (jobs.find, jobs.glance, cancel, erase, replay):
        with pytest.raises(JobNotFound):
            use_case(runtime, stranger, job.id)


def test_a_key_is_looked_up_once_for_a_new_request(runtime, caller, statements):
    submit(runtime, caller, ASKED, once=a_key())

    assert sum(statement.startswith("SELECT") and "idempotency_keys" in statement for statement in statements) == 1


def test_nothing_is_prepared_for_a_request_that_came_before(runtime, caller):
    once = a_key()
    first = submit(runtime, caller, ASKED, once=once)

    again = accept_once(runtime, caller, never, once=once)

    assert (again.job.id, again.is_new) == (first.job.id, False)


def test_a_job_that_may_not_answer_any_more_makes_room_for_another_under_its_key(runtime, caller):
    once = a_key()
    first = submit(runtime, caller, ASKED, once=once)

    second = accept_once(runtime, caller, lambda: prepare(runtime, caller, ASKED), once=once, may_answer=lambda earlier: False)

    assert second.is_new
    assert accept_once(runtime, caller, never, once=once).job.id == second.job.id != first.job.id


def test_a_request_that_is_refused_comes_to_the_job_that_its_double_made_meanwhile(runtime, caller):
    once, made = a_key(), []

    def prepare_too_late() -> Prepared:
        made.append(submit(runtime, caller, ASKED, once=once))
        raise FleetSaturated("The fleet is full.", retry_after_s=1)

    again = accept_once(runtime, caller, prepare_too_late, once=once)

    assert (again.job.id, again.is_new) == (made[0].job.id, False)


def test_a_batch_that_came_before_is_not_read_again(runtime, caller):
    once = a_key()
    first = submit_batch(runtime, caller, iter([ASKED, ASKED]), once=once)

    again = submit_batch(runtime, caller, (never() for _ in range(2)), once=once)

    assert len(first.jobs) == 2
    assert (again.jobs.keys(), again.is_new) == (first.jobs.keys(), False)


def test_a_batch_whose_items_are_refused_comes_to_what_its_double_made_meanwhile(runtime, caller):
    once, made = a_key(), []

    def too_late():
        made.append(submit_batch(runtime, caller, iter([ASKED]), once=once))
        yield FleetSaturated("The fleet is full.", retry_after_s=1)

    again = submit_batch(runtime, caller, too_late(), once=once)

    assert (again.jobs.keys(), again.is_new) == (made[0].jobs.keys(), False)


def test_an_estimate_writes_nothing(runtime, caller, statements):
    expected = estimate(runtime, caller, ASKED)

    assert expected.params.num_steps == 4
    assert [statement for statement in statements if not statement.startswith("SELECT")] == []
