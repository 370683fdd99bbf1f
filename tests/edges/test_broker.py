"""The only publisher: a message says which job to look at and nothing else."""

import base64
import json
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import redis

from benchmarks.lib.refusals import REPLIES
from edges.broker import Broker, BrokerUnavailable, job_of_message
from policy import queues
from settings import StoreSettings
from tests.builders import a_closed_port, a_fleet, a_redis, until

FAST = "local.fast"


@pytest.fixture
def broker(settings, broker_redis) -> Broker:
    return Broker(settings, a_fleet())


@pytest.fixture
def mortal_redis(tmp_path):
    """Start and stop a broker of one's own: `mortal_redis.start()`, `mortal_redis.stop()`."""
    port = a_closed_port()

    class MortalRedis:
        url = f"redis://127.0.0.1:{port}/0"

        def start(self):
            binary = str(Path(sys.executable).with_name("redis-server"))
            command = [binary, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(tmp_path), "--save", ""]
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            until(self._answers, what="redis-server")

        def stop(self):
            self.process.kill()
            self.process.wait()

        def _answers(self):
            try:
                return redis.Redis.from_url(self.url).ping()
            except redis.RedisError:
                return False

    mortal_redis = MortalRedis()
    mortal_redis.start()
    yield mortal_redis
    mortal_redis.stop()


@pytest.fixture
def broker_away(settings) -> Broker:
    return Broker(StoreSettings(**{**settings.model_dump(), "broker_url": f"redis://127.0.0.1:{a_closed_port()}/0"}), a_fleet())


def test_a_message_carries_the_job_s_id_and_how_many_images_it_is_to_make(broker, broker_redis):
    job_id = uuid.uuid4()

    broker.announce(queues.STORE_IMAGES, FAST, job_id)
    broker.announce(queues.RENDER_JOB, FAST, job_id, num_images=3)

    render, store = (json.loads(raw) for raw in broker_redis.lrange(FAST, 0, -1))
    arguments, keywords, _ = json.loads(base64.b64decode(render["body"]))
    assert (arguments, keywords) == ([], {"job_id": str(job_id)})
    assert (render["headers"]["task"], render["headers"]["id"]) == (queues.RENDER_JOB, f"{job_id}:render")
    assert render["headers"][queues.NUM_IMAGES] == 3
    assert queues.NUM_IMAGES not in store["headers"]


def test_a_message_lies_in_its_own_queue_only(broker, broker_redis):
    broker.announce(queues.RENDER_JOB, FAST, uuid.uuid4())
    broker.announce(queues.STORE_IMAGES, "results.batch", uuid.uuid4())

    lengths = {queue: broker_redis.llen(queue) for queue in queues.all_queues(a_fleet())}
    assert {queue: length for queue, length in lengths.items() if length} == {FAST: 1, "results.batch": 1}


def test_a_misspelt_queue_is_an_error_and_not_a_place_where_jobs_wait_for_ever(broker, broker_redis):
    with pytest.raises(Exception, match=r"local\.fsat"):
        broker.announce(queues.RENDER_JOB, "local.fsat", uuid.uuid4())

    assert broker_redis.llen("local.fsat") == 0


def test_who_looks_at_the_queue_is_told_how_many_wait_and_who_is_next(broker):
    first, second = uuid.uuid4(), uuid.uuid4()
    assert (broker.waiting(FAST), broker.next_job(FAST)) == (0, None)

    broker.announce(queues.RENDER_JOB, FAST, first)
    broker.announce(queues.RENDER_JOB, FAST, second)

    assert (broker.waiting(FAST), broker.next_job(FAST)) == (2, first)


@pytest.mark.parametrize(("name", "queue"), [(queues.RENDER_JOB, FAST), (queues.STORE_IMAGES, "results.fast")])
def test_a_raw_message_tells_its_job(broker, broker_redis, name, queue):
    job_id = uuid.uuid4()
    broker.announce(name, queue, job_id)

    assert job_of_message(broker_redis.lindex(queue, -1)) == job_id


def test_a_raw_message_tells_its_job_by_its_arguments_too(broker, broker_redis):
    """As when somebody sends it by hand, with a task id of Celery's own choice that means nothing."""
    job_id = uuid.uuid4()
    broker.announce(queues.RENDER_JOB, FAST, job_id)
    message = json.loads(broker_redis.lindex(FAST, -1))
    message["headers"]["id"] = message["properties"]["correlation_id"] = "by-hand"

    assert job_of_message(json.dumps(message).encode()) == job_id


@pytest.mark.parametrize("raw", [b"", b"\xff\x00", b"[]", b"{}", b"null", b'{"headers": null}', b'{"headers": {}, "body": "e30="}'])
def test_a_message_that_is_not_ours_tells_no_job(raw):
    assert job_of_message(raw) is None


def test_a_broker_that_is_away_is_an_error_at_once(broker_away):
    started = time.monotonic()

    with pytest.raises(BrokerUnavailable):
        broker_away.announce(queues.RENDER_JOB, FAST, uuid.uuid4())

    assert time.monotonic() - started < 2


def test_a_broker_that_comes_back_is_used_again_at_once(settings, mortal_redis):
    broker = Broker(StoreSettings(**{**settings.model_dump(), "broker_url": mortal_redis.url}), a_fleet())
    broker.announce(queues.RENDER_JOB, FAST, uuid.uuid4())

    mortal_redis.stop()
    for _ in range(2):
        with pytest.raises(BrokerUnavailable):
            broker.announce(queues.RENDER_JOB, FAST, uuid.uuid4())
    mortal_redis.start()

    broker.announce(queues.RENDER_JOB, FAST, uuid.uuid4())
    assert broker.waiting(FAST) == 1


def test_a_broker_that_is_away_is_the_same_error_whatever_is_asked(broker_away):
    for ask in (broker_away.check, lambda: broker_away.waiting(FAST), lambda: broker_away.next_job(FAST)):
        with pytest.raises(BrokerUnavailable):
            ask()


def test_every_error_that_a_broker_answers_with_is_one_kind_and_passes(settings, broker_redis, proxied):
    proxy, url = proxied(settings.broker_url)
    broker = Broker(StoreSettings(**{**settings.model_dump(), "broker_url": url}), a_fleet())
    broker.announce(queues.RENDER_JOB, FAST, uuid.uuid4())

    for reply in REPLIES.values():
        with proxy.refusing(reply):
            for ask in (
                broker.check,
                lambda: broker.waiting(FAST),
                lambda: broker.announce(queues.RENDER_JOB, FAST, uuid.uuid4()),
            ):
                with pytest.raises(BrokerUnavailable):
                    ask()
        broker.announce(queues.RENDER_JOB, FAST, uuid.uuid4())

    assert broker.waiting(FAST) == 1 + len(REPLIES)


def test_a_broker_that_is_read_only_answers_questions_and_fails_the_check(mortal_redis, settings):
    broker = Broker(StoreSettings(**{**settings.model_dump(), "broker_url": mortal_redis.url}), a_fleet())
    broker.check()

    redis.Redis.from_url(mortal_redis.url).execute_command("REPLICAOF", "127.0.0.1", "1")

    assert broker.waiting(FAST) == 0
    with pytest.raises(BrokerUnavailable, match="ReadOnly"):
        broker.check()


def test_a_publisher_leaves_a_server_that_was_demoted_for_the_one_that_took_over(mortal_redis, settings, proxied, tmp_path):
    proxy, url = proxied(mortal_redis.url)
    broker = Broker(StoreSettings(**{**settings.model_dump(), "broker_url": url}), a_fleet())
    broker.announce(queues.RENDER_JOB, FAST, uuid.uuid4())

    with a_redis(tmp_path) as successor:
        redis.Redis.from_url(mortal_redis.url).execute_command("REPLICAOF", "127.0.0.1", "1")
        proxy.lead_to(successor)
        with pytest.raises(BrokerUnavailable):
            broker.announce(queues.RENDER_JOB, FAST, uuid.uuid4())
        broker.announce(queues.RENDER_JOB, FAST, uuid.uuid4())

        assert redis.Redis.from_url(successor).llen(FAST) == 1
