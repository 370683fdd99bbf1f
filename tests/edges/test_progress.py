"""Signals about running jobs: best effort, never in anybody's way, and back after every cut."""

import queue
import threading
import time
import uuid

import pytest

from edges import progress
from edges.progress import (
    CANCELS,
    ENDINGS,
    LOOK_EVERY_S,
    Endings,
    JobSignals,
    Listener,
    Preview,
    ProgressWriter,
    Step,
)
from tests.builders import a_closed_port, until
from tests.edges.conftest import subscribers


@pytest.fixture
def signals(settings, handoff_redis) -> JobSignals:
    return JobSignals(settings.handoff_url)


@pytest.fixture
def writer(settings, handoff_redis):
    writer = ProgressWriter(settings.handoff_url)
    yield writer
    writer.close()


@pytest.fixture
def heard(settings, handoff_redis):
    """What a listener of cancels hears, as a queue of job ids."""
    heard = queue.SimpleQueue()
    listener = Listener(settings.handoff_url, CANCELS, heard.put)
    until(lambda: subscribers(handoff_redis), what="the subscription")
    yield heard
    listener.close()


@pytest.fixture
def endings(settings, handoff_redis):
    endings = Endings(settings.handoff_url)
    until(lambda: subscribers(handoff_redis), what="the subscription")
    yield endings
    endings.close()


def test_the_newest_step_of_every_image_can_be_read(writer, signals):
    job_id = uuid.uuid4()

    for step in (1, 2, 3):
        writer.note(job_id, Step(0, step, 20))
    writer.note(job_id, Step(1, 7, 20))

    until(lambda: signals.steps(job_id) == [Step(0, 3, 20), Step(1, 7, 20)], within_s=60)


def test_of_an_unknown_job_no_step_is_known(signals):
    assert signals.steps(uuid.uuid4()) == []


def test_progress_is_forgotten_after_a_while(writer, signals, handoff_redis):
    job_id = uuid.uuid4()
    writer.note(job_id, Step(0, 1, 20))
    until(lambda: signals.steps(job_id), within_s=60)

    keys = handoff_redis.keys()
    assert len(keys) == 2  # the newest steps, and the record of events
    assert all(0 < handoff_redis.ttl(key) <= 600 for key in keys)


def test_a_cancel_is_heard(signals, heard):
    job_id = uuid.uuid4()

    signals.publish_cancel(job_id)

    assert heard.get(timeout=60) == job_id


def test_messages_that_are_not_understood_are_passed_over(signals, heard, handoff_redis):
    for nonsense in (b"", b"\xff", b"[]", b'{"job_id": 7}', b'{"job": "x"}', b'"x"', b"null"):
        handoff_redis.publish(CANCELS, nonsense)
    job_id = uuid.uuid4()

    signals.publish_cancel(job_id)

    assert heard.get(timeout=60) == job_id


def test_a_listener_whose_connection_was_killed_hears_again(signals, heard, handoff_redis):
    [connection] = subscribers(handoff_redis)

    handoff_redis.client_kill_filter(_id=connection["id"])

    def told_and_heard():
        # what is told before the listener is back is lost, and may be
        signals.publish_cancel(uuid.uuid4())
        return not heard.empty()

    until(told_and_heard, within_s=60, what="hearing again")


@pytest.fixture
def only_news(monkeypatch):
    """Without the news of its ending nobody looks again for a job."""
    monkeypatch.setattr(progress, "LOOK_EVERY_S", 3600.0)


class Waiter(threading.Thread):
    """Waits for a job; `asked` counts how often it looked whether `over` was set."""

    def __init__(self, endings: Endings, job_id: uuid.UUID):
        self.over = threading.Event()
        self.asked = 0
        super().__init__(target=endings.wait, args=(job_id, 600, self._look), daemon=True)
        self.start()
        until(lambda: self.asked, within_s=60, what="a first look")

    def _look(self) -> bool:
        is_over = self.over.is_set()
        self.asked += 1
        return is_over

    def has_returned(self) -> bool:
        self.join(timeout=60)
        return not self.is_alive()


def test_a_waiter_is_woken_by_the_news(endings, signals, only_news):
    job_id = uuid.uuid4()
    waiter = Waiter(endings, job_id)

    waiter.over.set()
    signals.publish_ending(job_id)

    assert waiter.has_returned()


def test_everybody_who_waits_for_a_job_is_woken(endings, signals, only_news):
    job_id = uuid.uuid4()
    waiters = [Waiter(endings, job_id) for _ in range(5)]

    for waiter in waiters:
        waiter.over.set()
    signals.publish_ending(job_id)

    assert all(waiter.has_returned() for waiter in waiters)
    assert endings._waiting == {}


def test_a_job_that_is_over_is_not_waited_for(endings, monkeypatch):
    monkeypatch.setattr(progress, "_wait_for_event", lambda *_: pytest.fail("it waits"))

    endings.wait(uuid.uuid4(), 30, lambda: True)


def test_a_wait_ends_when_its_time_is_up(endings, monkeypatch):
    monkeypatch.setattr(progress, "LOOK_EVERY_S", 60.0)  # its time is up before the next look
    started = time.monotonic()

    endings.wait(uuid.uuid4(), 0.3, lambda: False)

    assert 0.3 <= time.monotonic() - started < 30


def test_an_ending_whose_news_was_lost_is_seen_all_the_same(endings, monkeypatch):
    assert LOOK_EVERY_S == 2
    monkeypatch.setattr(progress, "LOOK_EVERY_S", 0.02)
    waiter = Waiter(endings, uuid.uuid4())

    waiter.over.set()

    assert waiter.has_returned()


def test_another_job_s_ending_wakes_nobody(endings, signals, only_news):
    job_id, other_id = uuid.uuid4(), uuid.uuid4()
    waiter, other = Waiter(endings, job_id), Waiter(endings, other_id)

    other.over.set()
    for _ in range(5):
        signals.publish_ending(uuid.uuid4())
    signals.publish_ending(other_id)

    assert other.has_returned()  # so all that was told before it has been heard
    assert not endings._waiting[job_id][0].is_set()
    assert waiter.asked == 1
    waiter.over.set()
    signals.publish_ending(job_id)
    assert waiter.has_returned()


def test_without_redis_nobody_is_kept_from_working():
    url = f"redis://127.0.0.1:{a_closed_port()}/0"
    signals, writer = JobSignals(url), ProgressWriter(url)

    writer.note(uuid.uuid4(), Step(0, 1, 20))
    signals.publish_cancel(uuid.uuid4())
    signals.publish_ending(uuid.uuid4())

    assert signals.steps(uuid.uuid4()) == []
    writer.close()


def test_endings_and_cancels_are_told_apart(signals, heard):
    signals.publish_ending(uuid.uuid4())
    job_id = uuid.uuid4()
    signals.publish_cancel(job_id)

    assert heard.get(timeout=60) == job_id
    assert ENDINGS != CANCELS


def test_previews_are_dropped_while_the_hand_off_is_half_full_and_their_making_ends(
    settings, handoff_redis
):
    fill, unwatched = [0.6], queue.SimpleQueue()
    writer = ProgressWriter(settings.handoff_url, fill=lambda: fill[0])
    writer.when_unwatched(unwatched.put)
    job_id = uuid.uuid4()
    try:
        writer.show(job_id, Preview(0, 1, 4, b"jpeg"))
        assert unwatched.get(timeout=60) == job_id
        assert [fields[b"kind"] for _, fields in handoff_redis.xrange(f"events:{job_id}")] == []

        fill[0] = 0.4
        writer.show(job_id, Preview(0, 2, 4, b"jpeg"))
        until(
            lambda: (
                [fields[b"kind"] for _, fields in handoff_redis.xrange(f"events:{job_id}")]
                == [b"preview"]
            ),
            within_s=60,
        )
    finally:
        writer.close()


def test_a_listener_whose_hearer_fails_hears_the_next(settings, handoff_redis, signals):
    heard = queue.SimpleQueue()

    def hear(job_id):
        heard.put(job_id)
        raise RuntimeError("one bad ending")

    listener = Listener(settings.handoff_url, ENDINGS, hear)
    until(lambda: subscribers(handoff_redis), what="the subscription")
    first, second = uuid.uuid4(), uuid.uuid4()

    signals.publish_ending(first)
    signals.publish_ending(second)

    assert [heard.get(timeout=60), heard.get(timeout=60)] == [first, second]
    listener.close()


def test_a_waiter_that_gives_up_leaves_the_others_to_be_woken(endings, signals, only_news):
    job_id = uuid.uuid4()
    waiter = Waiter(endings, job_id)
    endings.wait(job_id, 0.02, lambda: False)

    waiter.over.set()
    signals.publish_ending(job_id)

    assert waiter.has_returned()
