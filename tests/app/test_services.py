"""Use cases without a request: a runtime and a caller are all they take."""

import contextlib
import math
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from sqlalchemy import event, text

from app.documents import of_row
from app.problems import (
    FleetSaturated,
    InvalidImageRequest,
    JobNotFound,
    ReplayImpossible,
)
from app.runtime import open_runtime
from app.services import cancel as canceling
from app.services import files, inputs, jobs, quotas, webhooks
from app.services.batches import submit_batch
from app.services.cancel import cancel, erase
from app.services.estimate import estimate
from app.services.replay import replay
from app.services.submit import (
    JobRequest,
    Prepared,
    accept_once,
    prepare,
    start_deadline_s,
    submit,
)
from edges.broker import BrokerUnavailable
from models import releasing
from models.database import transaction
from models.idempotency import IdempotentRequest
from models.tables import Tenant
from policy.params import RequestedParams
from policy.release import ReleaseHint
from policy.states import JobState
from policy.webhooks import ENDED_EVENTS
from settings import GatewaySettings
from tests.builders import a_lease, hand_off, settings_for, store, until
from tests.pictures import png

ASKED = JobRequest(
    RequestedParams(prompt="a red circle", tier="batch", steps=4),
    pictures={},
    metadata={"page": "7"},
)


def a_key() -> IdempotentRequest:
    return IdempotentRequest(uuid.uuid4().hex, "0" * 64)


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


# What a worker changes of a job, which may begin at once.
CHANGES = {
    "state",
    "attempt",
    "started_at",
    "rendered_at",
    "finished_at",
    "run_by",
    "device_seconds",
    "cost",
    "images",
}


def test_an_accepted_job_is_told_as_its_row_has_it(runtime, caller):
    asked = replace(ASKED, requested=replace(ASKED.requested, n=2), start_within_s=60.0)
    first = submit(runtime, caller, asked).job
    again = replay(runtime, caller, first.id).job

    for told in (first, again):
        row = of_row(jobs.find(runtime, caller, told.id))
        differing = {name for name in asdict(told) if getattr(told, name) != getattr(row, name)}
        assert differing <= CHANGES
        assert [(image.index, image.seed) for image in told.images] == [
            (image.index, image.seed) for image in row.images
        ]
    assert (first.replay_of, again.replay_of) == (None, first.id)


def test_a_job_of_another_tenant_is_not_found_by_any_use_case(runtime, caller):
    stranger = replace(caller, tenant_id=uuid.uuid4())
    job = submit(runtime, caller, ASKED).job

    for use_case in (jobs.find, jobs.find_with_images, cancel, erase, replay):
        with pytest.raises(JobNotFound):
            use_case(runtime, stranger, job.id)


def test_a_key_is_looked_up_once_for_a_new_request(runtime, caller, statements):
    submit(runtime, caller, ASKED, idempotent=a_key())

    assert (
        sum(
            statement.startswith("SELECT") and "idempotency_keys" in statement
            for statement in statements
        )
        == 1
    )


def test_nothing_is_prepared_for_a_request_that_came_before(runtime, caller):
    idempotent = a_key()
    first = submit(runtime, caller, ASKED, idempotent=idempotent)

    again = accept_once(runtime, caller, never, idempotent=idempotent)

    assert (again.job.id, again.is_new) == (first.job.id, False)


def test_a_job_that_may_not_answer_any_more_makes_room_for_another_under_its_key(runtime, caller):
    idempotent = a_key()
    first = submit(runtime, caller, ASKED, idempotent=idempotent)

    second = accept_once(
        runtime,
        caller,
        lambda: prepare(runtime, caller, ASKED),
        idempotent=idempotent,
        may_answer=lambda earlier: False,
    )

    assert second.is_new
    assert (
        accept_once(runtime, caller, never, idempotent=idempotent).job.id
        == second.job.id
        != first.job.id
    )


def test_a_request_that_is_refused_comes_to_the_job_that_its_double_made_meanwhile(runtime, caller):
    idempotent, made = a_key(), []

    def prepare_too_late() -> Prepared:
        made.append(submit(runtime, caller, ASKED, idempotent=idempotent))
        raise FleetSaturated("The fleet is full.", retry_after_s=1)

    again = accept_once(runtime, caller, prepare_too_late, idempotent=idempotent)

    assert (again.job.id, again.is_new) == (made[0].job.id, False)


def test_a_batch_that_came_before_is_not_read_again(runtime, caller):
    idempotent = a_key()
    first = submit_batch(runtime, caller, iter([ASKED, ASKED]), idempotent=idempotent)

    again = submit_batch(runtime, caller, (never() for _ in range(2)), idempotent=idempotent)

    assert len(first.jobs) == 2
    assert (again.jobs.keys(), again.is_new) == (first.jobs.keys(), False)


def test_a_batch_whose_items_are_refused_comes_to_what_its_double_made_meanwhile(runtime, caller):
    idempotent, made = a_key(), []

    def too_late():
        made.append(submit_batch(runtime, caller, iter([ASKED]), idempotent=idempotent))
        yield FleetSaturated("The fleet is full.", retry_after_s=1)

    again = submit_batch(runtime, caller, too_late(), idempotent=idempotent)

    assert (again.jobs.keys(), again.is_new) == (made[0].jobs.keys(), False)


def test_an_estimate_writes_nothing(runtime, caller, statements):
    expected = estimate(runtime, caller, ASKED)

    assert expected.params.num_steps == 4
    assert [statement for statement in statements if not statement.startswith("SELECT")] == []


class Releases:
    """Takes note of what is announced and of what is released, and does neither."""

    def __init__(self) -> None:
        self.announced: list[uuid.UUID] = []
        self.released: list[tuple[str, str]] = []

    def announce(self, pool, tier, job_id, *, num_images) -> None:
        self.announced.append(job_id)

    def release(self, pool, tier, *, tenant_id) -> None:
        self.released.append((pool, tier))


@pytest.mark.parametrize(
    ("hint", "may_pass", "goes"),
    [
        (ReleaseHint.IMMEDIATE, True, "at once"),
        (ReleaseHint.IMMEDIATE, False, "in turn"),
        (ReleaseHint.TRY_RELEASE, True, "in turn"),
        (ReleaseHint.BACKLOGGED, True, "later"),
    ],
)
def test_an_accepted_job_goes_at_once_or_in_turn_or_waits_for_others(
    runtime, caller, monkeypatch, hint, may_pass, goes
):
    """Somebody may have come to wait since the hint was made.

    Then the job must not be forgotten.
    """
    releases = Releases()
    _, limits = runtime.forecaster.release_hint(
        prepare(runtime, caller, ASKED).params, caller.tenant_id
    )
    monkeypatch.setattr(runtime.forecaster, "release_hint", lambda *_: (hint, limits))
    monkeypatch.setattr(releasing, "may_pass_at_once", lambda *_, **__: may_pass)

    job = submit(replace(runtime, release=releases), caller, ASKED).job

    assert releases.announced == ([job.id] if goes == "at once" else [])
    assert releases.released == ([(job.pool, job.tier)] if goes == "in turn" else [])


def test_a_batch_is_released_in_every_tier_that_it_asks_for(runtime, caller):
    releases = Releases()
    other = replace(ASKED, requested=replace(ASKED.requested, tier="quality"))

    submit_batch(replace(runtime, release=releases), caller, iter([ASKED, other, ASKED]))

    assert (releases.announced, releases.released) == (
        [],
        [("local", "batch"), ("local", "quality")],
    )


@pytest.mark.parametrize("what", ["job", "batch", "replay"])
def test_a_picture_that_is_deleted_before_its_job_is_written_refuses_it(
    runtime, caller, monkeypatch, what
):
    """A replay says so in its own words: its caller named no picture."""
    file = inputs.keep(runtime, caller, png(), field="file")
    asked = replace(ASKED, pictures={"init_image": str(file.id)})
    first = submit(runtime, caller, asked).job
    cancel(runtime, caller, first.id)

    def prepared_too_early() -> Prepared:
        prepared = prepare(runtime, caller, asked)
        files.erase(runtime, caller, file.id)
        return replace(prepared, replay_of=first.id if what == "replay" else None)

    def send():
        if what != "batch":
            return accept_once(runtime, caller, prepared_too_early)
        monkeypatch.setattr(quotas, "budget_charge", erase_first)
        return submit_batch(runtime, caller, iter([asked]))

    def erase_first(*_, **__):
        """Delete the picture as the batch is about to be written: then it charges the budget."""
        files.erase(runtime, caller, file.id)
        return contextlib.nullcontext()

    refusal = ReplayImpossible if what == "replay" else InvalidImageRequest
    with pytest.raises(refusal, match="deleted"):
        send()


def test_a_job_that_is_erased_before_its_replay_is_written_refuses_it(runtime, caller):
    first = submit(runtime, caller, ASKED).job
    cancel(runtime, caller, first.id)

    def prepared_too_early() -> Prepared:
        prepared = prepare(runtime, caller, ASKED)
        erase(runtime, caller, first.id)
        return replace(prepared, replay_of=first.id)

    with pytest.raises(ReplayImpossible, match="erased"):
        accept_once(runtime, caller, prepared_too_early)


@pytest.mark.parametrize(("asked_s", "holds_s"), [(None, 600.0), (600.0, 600.0), (0.001, 0.001)])
def test_a_start_deadline_is_the_tier_s_or_as_much_sooner_as_asked(asked_s, holds_s):
    assert start_deadline_s(asked_s, 600.0) == holds_s


@pytest.mark.parametrize("asked_s", [0.0, -1.0, math.inf, math.nan, 600.001])
def test_a_start_deadline_beyond_the_tier_s_or_none_at_all_is_refused(asked_s):
    with pytest.raises(InvalidImageRequest) as refused:
        start_deadline_s(asked_s, 600.0)

    [error] = refused.value.members["errors"]
    assert (error["pointer"], error["accepted"]) == ("/start_deadline_s", {"min": 0, "max": 600.0})


@pytest.mark.parametrize("stored", [[], [0], [1]])
def test_the_store_is_tidied_after_an_erasure_if_any_image_was_stored(
    runtime, caller, stack_database, monkeypatch, stored
):
    asked_for = []
    monkeypatch.setattr(canceling, "ask_to_tidy", asked_for.append)
    with transaction(stack_database) as session:
        lease = a_lease(session, tenant=session.get_one(Tenant, caller.tenant_id), num_images=2)
        for index in stored:
            hand_off(session, lease, index)
            store(session, lease.job, index)
        job_id = lease.job.id

    erase(runtime, caller, job_id)

    assert asked_for == ([runtime] if stored else [])


class ABroker:
    """Takes note of the deliveries that it is asked to announce; `is_away`: refuses them."""

    def __init__(self, *, is_away: bool) -> None:
        self.is_away = is_away
        self.asked: list[uuid.UUID] = []

    def ask_to_deliver(self, delivery_id: uuid.UUID) -> None:
        self.asked.append(delivery_id)
        if self.is_away:
            raise BrokerUnavailable("refused")


@pytest.mark.parametrize("is_away", [False, True])
def test_a_delivery_a_tenant_asks_for_is_announced_at_once_or_noted_without_a_broker(
    runtime, caller, is_away
):
    broker = ABroker(is_away=is_away)
    told = replace(runtime, broker=broker)
    url, events = "https://receiver.invalid/", list(ENDED_EVENTS)
    endpoint, _ = webhooks.create(told, caller, url=url, events=events, description="")

    delivery = webhooks.send_test(told, caller, endpoint.id)
    again = webhooks.redeliver(told, caller, delivery.id)

    assert broker.asked == [delivery.id, delivery.id] == [again.id, again.id]
    webhooks.delete(runtime, caller, endpoint.id)


def test_keys_queues_and_readiness_are_read_while_every_connection_is_taken_by_writers(
    runtime, caller, stack, closing
):
    settings = settings_for(GatewaySettings, stack.env, database_pool_size=1)
    busy = open_runtime(settings, runtime.fleet)
    asked = prepare(runtime, caller, ASKED).params

    with contextlib.ExitStack() as writers, ThreadPoolExecutor(1) as threads:
        for _ in range(2):  # the one of the pool, and one that overflows it
            writers.enter_context(transaction(busy.database)).execute(text("SELECT 1"))
        known = threads.submit(busy.keyring.find, caller.kid).result(5)
        place = threads.submit(busy.forecaster.expect, asked, caller.tenant_id).result(5).place
        until(lambda: busy.readiness.parts()["database"]["ready"], within_s=60)

    assert known is not None
    assert place.jobs_ahead is not None
    closing(busy)


def test_a_picture_is_noted_as_an_upload_before_it_is_put_into_the_store(
    runtime, caller, stack_database
):
    """If the process ends between the two, the object without a row is found and deleted."""
    noted = []

    def put(key: str, content: bytes, *, content_type: str) -> None:
        with transaction(stack_database) as session:
            query = text("SELECT count(*) FROM uploads WHERE object_key = :key")
            noted.append(session.scalar(query, {"key": key}))

    inputs.keep(replace(runtime, store=SimpleNamespace(put=put)), caller, png(), field="file")

    assert noted == [1]
