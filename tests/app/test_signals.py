"""What a gateway tells others at once: a cancel to the worker, an ending to those who wait."""

import contextlib
import json
import uuid
from collections.abc import Callable, Iterator

import pytest
import redis

from edges.progress import CANCELS, ENDINGS
from models import leases
from models.database import transaction
from tests.builders import until

CANCELED = {CANCELS, ENDINGS}


@pytest.fixture
def told(stack) -> Iterator[Callable[[dict, set[str]], bool]]:
    """Whether the job was told of in these channels, and in no others, by the time one asks."""
    heard: dict[str, set[str]] = {}
    with contextlib.ExitStack() as opened:
        client = opened.enter_context(redis.Redis.from_url(stack.env["HANDOFF_URL"]))
        pubsub = opened.enter_context(client.pubsub(ignore_subscribe_messages=True))
        pubsub.subscribe(CANCELS, ENDINGS)
        pubsub.get_message(timeout=1)

        def told(job: dict, channels: set[str]) -> bool:
            while (message := pubsub.get_message(timeout=0.02)) is not None:
                job_id = json.loads(message["data"])["job_id"]
                heard.setdefault(job_id, set()).add(message["channel"].decode())
            return heard.get(job["id"], set()) == channels

        yield told


def begin(database, job) -> None:
    """Take the job's lease, as a worker that has just begun it."""
    with transaction(database) as session:
        assert leases.take(session, uuid.UUID(job["id"]), worker="tests", device="cpu", ttl_s=600)


def test_a_cancel_is_told_to_the_worker_and_to_those_who_wait(a_house, told, stack_database):
    tenant = a_house().with_workers().tenant()
    job = tenant.post().json
    begin(stack_database, job)
    assert told(job, set())

    tenant.send(job["urls"]["cancel"], {})

    until(lambda: told(job, CANCELED), within_s=60)


def test_an_erasure_is_told_to_the_worker_and_to_those_who_wait(a_house, told, stack_database):
    tenant = a_house().with_workers().tenant()
    job = tenant.post().json
    begin(stack_database, job)

    tenant.delete(job["urls"]["self"])

    until(lambda: told(job, CANCELED), within_s=60)


def test_the_end_of_a_job_that_no_worker_began_is_told_to_those_who_wait_alone(a_house, told):
    tenant = a_house().with_workers().tenant()
    job = tenant.post().json

    tenant.send(job["urls"]["cancel"], {})

    until(lambda: told(job, {ENDINGS}), within_s=60)


def test_a_status_that_was_just_asked_for_is_not_remembered_beyond_a_cancel(a_house):
    tenant = a_house().with_workers().tenant()
    ends = {
        "cancel": lambda job: tenant.send(job["urls"]["cancel"], {}),
        "erase": lambda job: tenant.delete(job["urls"]["self"]),
    }

    for end in ends.values():
        job = tenant.post().json
        assert tenant.get(job, "status")["state"] == "queued"
        end(job)
        assert tenant.get(job, "status")["state"] == "canceled"
