"""GET /v1/jobs/{id}/events: what a client of server-sent events reads, from the place in the queue
to the end.
"""

import base64
import io
import json
import signal
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest
import redis
from PIL import Image

from app.live import streams
from app.live.forecast import QueuePlace
from app.live.streams import LOOK_EVERY_S, JobEventStreams, _Forecast
from app.problems import StreamsExhausted
from edges.eventlog import STARTED, JobEvent
from edges.events import TooManySubscribers
from policy.prediction import Eta
from policy.states import FINAL_STATES
from tests.app.problem import assert_problem
from tests.builders import until

LONG = {"prompt": "a red circle", "tier": "quality", "steps": 30, "n": 2, "seed": 7}


@contextmanager
def following(api, job, *, after=None, path=None, **query):
    """The open stream, as an iterator of (id, kind, data); a heartbeat is (None, None, None)."""
    headers = {"Last-Event-ID": after} if after else {}
    with api.stream("GET", path or job["urls"]["events"], params=query, headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        yield events_of(answer)


def events_of(answer):
    fields = {}
    for line in answer.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        else:
            if "event" in fields:
                yield fields.get("id"), fields["event"], json.loads(fields["data"])
            elif "" in fields:
                yield None, None, None
            fields = {}


def read(api, job, **options):
    """All events of a stream, which ends by itself."""
    with following(api, job, **options) as events:
        return [event for event in events if event[1]]


def kinds(events):
    return [kind for _, kind, _ in events]


def create(api, **fields):
    answer = api.post("/v1/jobs", json={**LONG, **fields})
    assert answer.status_code == 202, answer.text
    return answer.json()


@pytest.fixture
def handoff_redis(stack):
    with redis.Redis.from_url(stack.env["HANDOFF_URL"]) as client:
        yield client


def test_a_job_is_followed_from_its_place_in_the_queue_to_its_end(api, held_worker):
    job = create(api)

    with following(api, job, previews="true") as stream:
        events = [next(stream)]
        held_worker()
        events += [event for event in stream if event[1]]

    order = list(dict.fromkeys(kinds(events)))
    assert order == ["queued", "started", "step", "preview", "stored", "final"]
    assert kinds(events).count("stored") == 2
    assert kinds(events)[-2:] == ["stored", "final"]
    assert events[0][2]["jobs_ahead"] >= 0
    assert 0 <= events[0][2]["eta_p50_s"] <= events[0][2]["eta_p90_s"]
    for index in (0, 1):
        steps = [
            data["step"] for _, kind, data in events if kind == "step" and data["index"] == index
        ]
        assert steps == sorted(set(steps))
        assert steps[-1] == 30
    ids = [tuple(map(int, id.split("-"))) for id, _, _ in events if id]
    assert ids == sorted(set(ids))


def test_the_end_brings_the_whole_job(api):
    job = create(api, steps=2)

    *_, (_, kind, final) = read(api, job)

    assert kind == "final"
    assert final == api.get(job["urls"]["self"]).json()
    assert final["state"] == "succeeded"


def test_a_stored_image_is_told_as_the_job_shows_it(api):
    job = create(api, steps=2)

    events = read(api, job)

    images = {image["index"]: image for image in events[-1][2]["images"]}
    stored = [data for _, kind, data in events if kind == "stored"]
    assert [data["index"] for data in stored] == [0, 1]
    assert stored == [
        {name: value for name, value in images[data["index"]].items() if name in data}
        for data in stored
    ]
    assert api.get(stored[0]["url"]).status_code == 302


def test_a_preview_is_a_small_picture_of_an_image_under_way(api):
    events = read(api, create(api), previews="true")

    previews = [data for _, kind, data in events if kind == "preview"]
    assert {data["index"] for data in previews} == {0, 1}
    for data in previews:
        picture = Image.open(io.BytesIO(base64.b64decode(data["jpeg_base64"])))
        assert (picture.format, picture.size) == ("JPEG", (data["width_px"], data["height_px"]))
        assert 1 <= data["step"] <= data["num_steps"] == 30


def test_previews_are_made_only_for_those_who_ask(api, handoff_redis):
    job = create(api, steps=8)

    events = read(api, job)

    assert "preview" not in kinds(events)
    assert not any(b"jpeg" in fields for _, fields in handoff_redis.xrange(f"events:{job['id']}"))


@pytest.mark.slow
def test_a_follower_that_asks_while_a_job_is_rendered_sees_previews_too(api):
    job = create(api)
    with following(api, job) as plain:
        next(event for event in plain if event[1] == "step")

        assert "preview" in kinds(read(api, job, previews="true"))


def test_a_follower_that_comes_back_is_told_exactly_the_rest(api):
    job = create(api, steps=4)
    events = read(api, job)
    middle = len(events) // 2

    assert read(api, job, after=events[middle][0]) == events[middle + 1 :]


def test_two_followers_are_told_the_same(api):
    job = create(api, steps=8)

    with ThreadPoolExecutor() as threads:
        one, other = threads.map(lambda _: read(api, job), range(2))

    assert [event for event in one if event[0]] == [event for event in other if event[0]]
    assert one[-1] == other[-1]


def test_a_job_that_is_long_over_is_its_end_alone(api, finished_job, handoff_redis):
    handoff_redis.delete(f"events:{finished_job['id']}")

    [(_, kind, final)] = read(api, finished_job)

    assert (kind, final["id"], final["state"]) == ("final", finished_job["id"], "succeeded")


def test_a_cancel_ends_the_stream_at_once(served, unserved, monkeypatch):
    monkeypatch.setattr(streams, "LOOK_EVERY_S", 600)  # somebody looks, but not within this test
    client, _ = served(**unserved)
    job = create(client)

    with following(client, job) as stream:
        assert next(stream)[1] == "queued"
        client.post(job["urls"]["cancel"])
        [(_, kind, final)] = [event for event in stream if event[1]]

    assert (kind, final["state"]) == ("final", "canceled")


def test_the_answer_is_a_stream_that_nobody_keeps(api, finished_job):
    with api.stream("GET", finished_job["urls"]["events"]) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Accel-Buffering"] == "no"
        assert next(answer.iter_lines()) == "retry: 2000"


def test_an_idle_stream_shows_that_it_is_alive(served, unserved):
    client, _ = served(event_heartbeat_s=0.2, **unserved)
    job = create(client)

    with following(client, job) as stream:
        beats = [next(stream) for _ in range(4)]

    assert kinds(beats) == ["queued", None, None, None]


class Socket:
    """A connection as deploy/connections.py puts it into the environment of a request."""

    def __init__(self) -> None:
        self.timeouts_s = []

    def has_left(self):
        return False

    def settimeout(self, timeout_s):
        self.timeouts_s.append(timeout_s)


def test_a_stream_that_nobody_reads_is_given_up_after_half_a_minute(
    api, gateway_with, canceled_job
):
    http, stream = gateway_with(), {"prompt": "a red circle", "tier": "batch", "stream": True}
    headers = {"Authorization": api.headers["Authorization"]}
    job_bodies = [
        ("GET", canceled_job["urls"]["events"], None),
        ("POST", "/v1/images/generations", stream),
    ]

    for method, path, body in job_bodies:
        socket = Socket()
        answer = http.open(
            path,
            method=method,
            json=body,
            headers=headers,
            environ_overrides={"gunicorn.socket": socket},
        )
        answer.close()
        assert (answer.status_code, socket.timeouts_s) == (200, [30]), path


def test_a_follower_that_left_is_forgotten(served, unserved):
    client, parts = served(event_heartbeat_s=0.2, gateway_max_streams=1, **unserved)
    job = create(client)

    with following(client, job) as stream:
        next(stream)
        assert [str(job_id) for job_id in parts.events._fanout.followed_jobs()] == [job["id"]]

    until(lambda: not parts.events._fanout.followed_jobs(), within_s=60, what="forgetting it")
    with following(client, job) as stream:
        assert next(stream)[1] == "queued"


def test_a_process_has_room_for_so_many_streams(served, unserved):
    # of three a tenant may have two: one is for others
    client, _ = served(gateway_max_streams=3, **unserved)
    job = create(client)

    with following(client, job) as one, following(client, job) as other:
        next(one), next(other)
        answer = client.get(job["urls"]["events"])

    assert_problem(answer, 503, "streams-exhausted")
    assert int(answer.headers["Retry-After"]) > 0


def test_another_tenant_s_job_cannot_be_followed(stranger, nobody, finished_job):
    assert_problem(stranger.get(finished_job["urls"]["events"]), 404, "job-not-found")
    assert_problem(nobody.get(finished_job["urls"]["events"]), 401, "unauthenticated")


@pytest.mark.parametrize("after", ["x", "1-2-3", "-1", "1.5", "9" * 30, "1-", "é".encode()])
def test_an_id_that_is_none_is_refused(api, finished_job, after):
    answer = api.get(finished_job["urls"]["events"], headers={"Last-Event-ID": after})

    assert_problem(answer, 422, "invalid-query")
    assert answer.json()["header"] == "Last-Event-ID"


def test_a_wrong_previews_parameter_is_told_the_accepted_values(api, finished_job):
    answer = api.get(finished_job["urls"]["events"], params={"previews": "maybe"})

    assert_problem(answer, 422, "invalid-query")
    assert answer.json()["accepted"] == ["true", "false"]


def test_a_flushed_redis_does_not_keep_a_stream_from_its_end(api, handoff_redis):
    job = create(api)

    with following(api, job) as stream:
        next(event for event in stream if event[1] == "step")
        handoff_redis.delete(f"events:{job['id']}")
        events = [event for event in stream if event[1]]

    assert events[-1][1] == "final"
    assert events[-1][2]["state"] in FINAL_STATES


@pytest.mark.slow
def test_a_redis_that_answers_nothing_does_not_keep_a_stream_from_its_end(api, stack, held_worker):
    job = create(api)

    with following(api, job) as stream:
        next(stream)
        stack.kill("handoff", signal.SIGSTOP)
        try:
            canceling = threading.Thread(target=api.post, args=(job["urls"]["cancel"],))
            canceling.start()
            *_, (_, kind, final) = [event for event in stream if event[1]]
        finally:
            stack.kill("handoff", signal.SIGCONT)
            canceling.join()

    assert (kind, final["state"]) == ("final", "canceled")


def test_an_image_stream_whose_gateway_stops_says_so_and_its_job_goes_on(served, unserved):
    client, parts = served(**unserved)
    call = {"prompt": "a red circle", "tier": "batch", "stream": True}

    with client.stream("POST", "/v1/images/generations", json=call) as answer:
        lines = answer.iter_lines()
        assert next(lines) == ": begin"
        parts.events.close()
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]

    assert json.loads(data[-2])["error"]["code"] == "part_unavailable"
    assert data[-1] == "[DONE]"
    job = f"/v1/jobs/{answer.headers['X-Darkroom-Job-Id']}"
    assert client.get(job).json()["state"] == "queued"
    client.post(f"{job}/cancel")


@pytest.mark.slow
def test_a_gateway_that_goes_ends_its_streams_at_once_and_the_next_one_goes_on(
    api, stack, held_worker
):
    job = create(api)

    with following(api, job) as stream:
        next(stream)
        asked_at = time.monotonic()
        stopping = threading.Thread(target=stack.stop, args=("gateway",))
        stopping.start()
        rest = [event for event in stream if event[1]]
        ended_s = time.monotonic() - asked_at
    stopping.join()
    stopped_s = time.monotonic() - asked_at
    stack.start("gateway")
    until(lambda: _answers(api), within_s=60, what="the gateway")
    held_worker()

    assert "final" not in kinds(rest)
    assert ended_s < 3
    assert stopped_s < 15  # not the whole grace of 20 s
    assert kinds(read(api, job))[-1] == "final"


def _answers(api):
    try:
        return api.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("error", [TooManySubscribers, ConnectionError])
def test_a_stream_that_cannot_begin_gives_its_place_back(error):
    def subscribe(job_id, **options):
        raise error

    fanout = SimpleNamespace(subscribe=subscribe)
    few = JobEventStreams(None, None, None, fanout, None, most=1)
    caller = SimpleNamespace(tenant_id=uuid.uuid4(), kid="kid")

    for _ in range(2):
        with pytest.raises(StreamsExhausted if error is TooManySubscribers else error):
            few.follow(caller, uuid.uuid4(), tell=None)

    few.take_place(caller.tenant_id).release()


class Places:
    """Says where the job stands; the test moves it on."""

    def __init__(self, monkeypatch) -> None:
        self._now = 1000.0
        self.at: QueuePlace | None = None
        monkeypatch.setattr(time, "monotonic", lambda: self._now)

    def place_of(self, job) -> QueuePlace | None:
        return self.at

    def told(self, forecast, jobs_ahead, end_s, *, after_s=0.0) -> bool:
        """Whether the follower hears of this place; end_s: from now; None: there is no forecast."""
        self._now += after_s
        self.at = None if jobs_ahead is None else QueuePlace(jobs_ahead, Eta(end_s, 2 * end_s))
        return bool(forecast.due_event())


@pytest.fixture
def places(monkeypatch):
    return Places(monkeypatch)


def a_queued(attempt=1):
    return SimpleNamespace(state="queued", attempt=attempt)


def test_a_place_in_the_queue_is_told_at_once_and_again_once_it_has_moved_by_more_than_a_tenth(
    places,
):
    forecast = _Forecast(places, a_queued())
    later = {"after_s": LOOK_EVERY_S}

    assert places.told(forecast, 100, 400.0)
    assert not places.told(forecast, 50, 200.0), "nobody looks again so soon"
    assert not places.told(forecast, 99, 395.0, **later), "as foreseen, and one place nearer"
    assert places.told(forecast, 89, 390.0, **later)
    assert not places.told(forecast, 89, 385.0, **later)
    assert places.told(forecast, 89, 430.0, **later), "the end has moved"


def test_that_there_is_no_forecast_is_told_once(places):
    forecast = _Forecast(places, a_queued())
    later = {"after_s": LOOK_EVERY_S}

    assert places.told(forecast, None, None)
    assert not places.told(forecast, None, None, **later)
    assert places.told(forecast, 3, 10.0, **later)


@pytest.mark.parametrize(("started", "goes_on"), [(0, True), (1, True), (2, False)])
def test_only_the_start_of_a_later_attempt_ends_the_forecast_of_a_job_that_waits_again(
    places, started, goes_on
):
    """Who comes late is told first of the attempt that was lost."""
    forecast = _Forecast(places, a_queued(attempt=1))

    forecast.hear(JobEvent("1-0", STARTED, {"attempt": started}))

    assert places.told(forecast, 3, 10.0) is goes_on
