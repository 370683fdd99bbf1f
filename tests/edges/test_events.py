"""Streams of jobs: nothing lost, nothing twice, bounded where it must be, and in nobody's way when
Redis is away.
"""

import io
import socket
import threading
import time
import uuid

import pytest
from PIL import Image

from edges import eventlog
from edges.eventlog import FINAL, PREVIEW, STARTED, STEP, STORED, JobEvent
from edges.events import SHUTDOWN, EventFanout, Subscription, TooManySubscribers
from edges.progress import WATCHES, JobSignals, Listener, Preview, ProgressWriter, Step
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
def fanout(settings, handoff_redis):
    fanout = EventFanout(settings.handoff_url, most=8)
    yield fanout
    fanout.close()


def tell(redis, job_id, kind, data, jpeg=None) -> str:
    pipe = redis.pipeline(transaction=False)
    eventlog.append(pipe, job_id, kind, data, jpeg)
    return pipe.execute()[0].decode()


def step(redis, job_id, number) -> str:
    return tell(redis, job_id, STEP, {"index": 0, "step": number, "num_steps": 99})


def heard(subscription, count) -> list[JobEvent]:
    """The next `count` events, which come within seconds."""
    events = [subscription.get(60) for _ in range(count)]
    assert None not in events
    return events


def steps_of(events) -> list[int]:
    return [event.data["step"] for event in events]


def a_jpeg(width_px=32, height_px=16) -> bytes:
    packed = io.BytesIO()
    Image.new("RGB", (width_px, height_px), "red").save(packed, "JPEG")
    return packed.getvalue()


def test_a_late_follower_is_told_what_happened_before_and_then_what_happens(fanout, handoff_redis):
    job_id = uuid.uuid4()
    tell(handoff_redis, job_id, STARTED, {"attempt": 1})
    step(handoff_redis, job_id, 1)

    subscription, earlier = fanout.subscribe(job_id, wants_previews=False)
    step(handoff_redis, job_id, 2)

    assert [event.kind for event in earlier] == [STARTED, STEP]
    assert steps_of(heard(subscription, 1)) == [2]


def test_a_follower_that_comes_back_is_told_exactly_the_rest(fanout, handoff_redis):
    job_id = uuid.uuid4()
    ids = [step(handoff_redis, job_id, number) for number in range(5)]

    _, earlier = fanout.subscribe(job_id, wants_previews=False, after=ids[2])

    assert steps_of(earlier) == [3, 4]
    assert [event.id for event in earlier] == ids[3:]


def test_an_id_of_a_time_to_come_is_waited_for_in_vain_but_not_the_end(fanout, handoff_redis):
    job_id = uuid.uuid4()
    subscription, earlier = fanout.subscribe(
        job_id, wants_previews=False, after="999999999999999-0"
    )
    step(handoff_redis, job_id, 1)

    fanout.end([job_id])

    assert earlier == []
    assert [event.kind for event in heard(subscription, 1)] == [FINAL]


def test_nothing_is_lost_or_told_twice_while_others_come_and_events_pour_in(fanout, handoff_redis):
    job_id, last = uuid.uuid4(), 200
    told: dict[int, list[int]] = {}

    def follow(number: int) -> None:
        time.sleep(number * 0.02)
        subscription, earlier = fanout.subscribe(job_id, wants_previews=False)
        told[number] = steps_of(earlier)
        while told[number][-1:] != [last]:
            told[number] += steps_of(heard(subscription, 1))

    followers = [threading.Thread(target=follow, args=(number,)) for number in range(8)]
    for follower in followers:
        follower.start()
    for number in range(1, last + 1):
        step(handoff_redis, job_id, number)
        time.sleep(0.001)
    for follower in followers:
        follower.join(timeout=60)

    assert told == {key: list(range(1, last + 1)) for key in range(8)}


def test_jobs_are_told_apart(fanout, handoff_redis):
    one, other = uuid.uuid4(), uuid.uuid4()
    subscription, _ = fanout.subscribe(one, wants_previews=False)
    other_subscription, _ = fanout.subscribe(other, wants_previews=False)

    step(handoff_redis, other, 7)
    step(handoff_redis, one, 1)

    assert steps_of(heard(subscription, 1)) == [1]
    assert steps_of(heard(other_subscription, 1)) == [7]
    assert subscription.get(0.2) is None


def subscribe(fanout, redis, job_id) -> Subscription:
    """A subscription, once the fanout hears of endings: what is told before is lost, and may be."""
    subscription, _ = fanout.subscribe(job_id, wants_previews=False)
    until(lambda: subscribers(redis), what="the subscription")
    return subscription


def test_the_end_is_told_after_all_that_came_before_it(fanout, signals, handoff_redis):
    job_id = uuid.uuid4()
    subscription = subscribe(fanout, handoff_redis, job_id)

    for index in range(4):
        signals.publish_stored(job_id, {"index": index})
    signals.publish_ending(job_id)

    assert [event.kind for event in heard(subscription, 5)] == [STORED] * 4 + [FINAL]


def test_the_record_of_an_ended_job_is_forgotten_soon(signals, handoff_redis):
    job_id = uuid.uuid4()
    signals.publish_stored(job_id, {"index": 0})
    assert 500 < handoff_redis.ttl(eventlog.key(job_id)) <= 600

    signals.publish_ending(job_id)

    assert 0 < handoff_redis.ttl(eventlog.key(job_id)) <= 60


def test_a_job_that_never_ran_leaves_no_record(signals, handoff_redis):
    signals.publish_ending(uuid.uuid4())

    assert handoff_redis.keys("events:*") == []


def test_a_slow_follower_loses_steps_but_no_stored_image_and_not_the_end(
    fanout, handoff_redis, signals
):
    job_id = uuid.uuid4()
    subscription = subscribe(fanout, handoff_redis, job_id)
    for number in range(1, 601):
        step(handoff_redis, job_id, number)
    until(lambda: subscription._unread.qsize() >= 256, within_s=60)

    signals.publish_stored(job_id, {"index": 0})
    signals.publish_ending(job_id)
    until(lambda: subscription._unread.qsize() >= 258, within_s=60)

    events = heard(subscription, 258)
    assert steps_of(events[:256]) == list(range(1, 257))
    assert [event.kind for event in events[256:]] == [STORED, FINAL]


def test_previews_go_to_those_who_asked(fanout, handoff_redis):
    job_id = uuid.uuid4()
    curious, _ = fanout.subscribe(job_id, wants_previews=True)
    plain, _ = fanout.subscribe(job_id, wants_previews=False)

    tell(handoff_redis, job_id, PREVIEW, {"index": 0, "step": 1, "num_steps": 4}, a_jpeg(32, 16))
    step(handoff_redis, job_id, 2)

    preview, _ = heard(curious, 2)
    assert (preview.kind, preview.data["width_px"], preview.data["height_px"]) == (PREVIEW, 32, 16)
    assert [event.kind for event in heard(plain, 1)] == [STEP]
    assert [event.kind for event in fanout.subscribe(job_id, wants_previews=True)[1]] == [
        PREVIEW,
        STEP,
    ]
    assert [event.kind for event in fanout.subscribe(job_id, wants_previews=False)[1]] == [STEP]


def test_of_each_image_only_the_newest_previews_are_kept(writer, signals, handoff_redis):
    job_id = uuid.uuid4()
    signals.publish_watched([job_id])

    for number in range(1, 6):
        for index in (0, 1):
            writer.show(job_id, Preview(index, number, 20, a_jpeg()))
        writer.flush(within_s=60)

    kept = [eventlog.parse(*entry) for entry in handoff_redis.xrange(eventlog.key(job_id))]
    assert sorted((event.data["index"], event.data["step"]) for event in kept) == [
        (0, 4),
        (0, 5),
        (1, 4),
        (1, 5),
    ]


def test_a_record_has_a_largest_size(handoff_redis):
    job_id = uuid.uuid4()

    for number in range(3000):
        step(handoff_redis, job_id, number)

    assert handoff_redis.xlen(eventlog.key(job_id)) < 1200
    assert handoff_redis.memory_usage(eventlog.key(job_id)) < 100_000


def test_events_that_a_worker_notes_are_told_in_order(writer, fanout):
    job_id = uuid.uuid4()
    subscription, _ = fanout.subscribe(job_id, wants_previews=True)

    writer.begin(job_id, 1)
    writer.note(job_id, Step(0, 1, 20))
    writer.show(job_id, Preview(0, 1, 20, a_jpeg()))

    events = heard(subscription, 3)
    assert [event.kind for event in events] == [STARTED, STEP, PREVIEW]
    assert events[0].data == {"attempt": 1}
    assert events[1].data == {"index": 0, "step": 1, "num_steps": 20}


def test_flush_tells_of_a_step_before_whatever_is_told_next(writer, signals, handoff_redis):
    job_id = uuid.uuid4()

    for number in range(20):
        writer.note(job_id, Step(0, number, 20))
        writer.flush(within_s=60)
        signals.publish_stored(job_id, {"index": number})

    kinds = [fields[b"kind"].decode() for _, fields in handoff_redis.xrange(eventlog.key(job_id))]
    assert kinds == [STEP, STORED] * 20


def test_flush_waits_no_longer_than_it_is_told_for_a_redis_that_hangs():
    # connections are taken, and nothing is answered
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        writer = ProgressWriter(f"redis://127.0.0.1:{deaf.getsockname()[1]}/0")
        writer.note(uuid.uuid4(), Step(0, 1, 2))
        began_at = time.monotonic()

        for _ in range(4):
            writer.flush(within_s=0.05)

        # without the limit it would take the 5 s of its connection
        assert 0.15 < time.monotonic() - began_at < 4
    writer.close()  # now that what it waits for has gone away


def test_steps_are_told_ten_times_a_second_at_most(writer, handoff_redis):
    job_id, began_at = uuid.uuid4(), time.monotonic()
    number = 0
    while number < 100 or time.monotonic() < began_at + 0.5:
        number += 1
        writer.note(job_id, Step(0, number, 9999))
        time.sleep(0.002)

    told = handoff_redis.xlen(eventlog.key(job_id))
    assert 1 <= told <= 10 * (time.monotonic() - began_at) + 1


def test_a_worker_learns_that_somebody_watches_and_that_nobody_does_any_more(
    settings, writer, signals, handoff_redis
):
    job_id, woken, unwatched = uuid.uuid4(), threading.Event(), threading.Event()
    listener = Listener(
        settings.handoff_url, WATCHES, lambda watched: woken.set() if watched == job_id else None
    )
    writer.when_unwatched(lambda left: unwatched.set() if left == job_id else None)
    assert not writer.is_watched(job_id)

    until(lambda: signals.publish_watched([job_id]) or woken.wait(0.1), what="the news")
    writer.show(job_id, Preview(0, 1, 20, a_jpeg()))
    writer.flush(within_s=60)

    assert writer.is_watched(job_id)
    assert not unwatched.is_set()
    # as it is half a minute after the last follower has gone
    handoff_redis.delete(f"watch:{job_id}")
    writer.show(job_id, Preview(0, 2, 20, a_jpeg()))
    assert unwatched.wait(60)
    listener.close()


def test_subscribe_refuses_more_followers_than_were_said(fanout):
    subscriptions = [fanout.subscribe(uuid.uuid4(), wants_previews=False)[0] for _ in range(8)]
    with pytest.raises(TooManySubscribers):
        fanout.subscribe(uuid.uuid4(), wants_previews=False)

    fanout.unsubscribe(subscriptions[0])
    fanout.unsubscribe(subscriptions[0])

    subscriptions[0], _ = fanout.subscribe(uuid.uuid4(), wants_previews=False)
    with pytest.raises(TooManySubscribers):
        fanout.subscribe(uuid.uuid4(), wants_previews=False)


def test_a_follower_that_left_is_forgotten(fanout):
    job_id = uuid.uuid4()
    subscriptions = [fanout.subscribe(job_id, wants_previews=wants)[0] for wants in (True, False)]
    assert (fanout.followed_jobs(), fanout.watched_jobs()) == ([job_id], [job_id])

    fanout.unsubscribe(subscriptions[0])
    assert (fanout.followed_jobs(), fanout.watched_jobs()) == ([job_id], [])

    fanout.unsubscribe(subscriptions[1])
    assert fanout.followed_jobs() == []


def test_a_reader_that_closes_sends_everybody_away(fanout):
    subscription, _ = fanout.subscribe(uuid.uuid4(), wants_previews=False)

    fanout.close()

    assert subscription.get(60) is SHUTDOWN
    with pytest.raises(TooManySubscribers):
        fanout.subscribe(uuid.uuid4(), wants_previews=False)


def test_entries_that_are_not_understood_are_passed_over(fanout, handoff_redis):
    job_id = uuid.uuid4()
    subscription, _ = fanout.subscribe(job_id, wants_previews=True)

    for fields in (
        {"x": "y"},
        {"kind": "step", "data": "{"},
        {"kind": "step", "data": "7", "jpeg": "no"},
        {"kind": b"\xff", "data": "{}"},
    ):
        handoff_redis.xadd(eventlog.key(job_id), fields)
    step(handoff_redis, job_id, 1)

    assert steps_of(heard(subscription, 1)) == [1]


def test_a_flushed_redis_costs_what_was_in_it_and_nothing_more(fanout, handoff_redis):
    job_id = uuid.uuid4()
    subscription, _ = fanout.subscribe(job_id, wants_previews=False)
    step(handoff_redis, job_id, 1)
    heard(subscription, 1)

    handoff_redis.flushdb()
    step(handoff_redis, job_id, 2)

    assert steps_of(heard(subscription, 1)) == [2]


def test_a_reader_whose_connection_was_killed_reads_on(fanout, handoff_redis):
    job_id = uuid.uuid4()
    subscription, _ = fanout.subscribe(job_id, wants_previews=False)

    handoff_redis.client_kill_filter(_type="normal", skipme=True)
    step(handoff_redis, job_id, 1)

    assert steps_of(heard(subscription, 1)) == [1]


def test_without_redis_the_end_is_told_all_the_same():
    job_id, url = uuid.uuid4(), f"redis://127.0.0.1:{a_closed_port()}/0"
    fanout = EventFanout(url, most=1)

    subscription, earlier = fanout.subscribe(job_id, wants_previews=True)
    fanout.end([job_id])

    assert earlier == []
    assert [event.kind for event in heard(subscription, 1)] == [FINAL]
    fanout.close()
