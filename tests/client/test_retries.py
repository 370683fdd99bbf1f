"""Both clients against a real server that fails.

What is tried again, how often, and that nothing is made twice.
"""

import hashlib
import inspect
import json
import random
import threading
import time
from email.utils import formatdate

import pytest

from darkroom_client import AsyncClient, Client, DigestMismatch, ProblemError, Retries, Unreachable
from tests.client.conftest import HASTY
from tests.client.test_client import PNG, a_job

SATURATED = {
    "type": "/problems/fleet-saturated",
    "title": "Fleet saturated",
    "status": 503,
    "detail": "Later.",
}


def accept(request):
    request.answer(202, a_job(state="queued"))


def show(request):
    request.answer(200, a_job())


def saturated(request, **headers):
    request.answer(503, SATURATED, **headers)


def keys(server):
    return [request.headers["Idempotency-Key"] for request in server.requests]


def test_a_create_that_is_refused_for_now_is_sent_again_under_the_same_key(either, server):
    server.will(saturated, saturated, accept)

    job = either.ask("create_job", "a red circle")

    assert (job.state, len(server.requests)) == ("queued", 3)
    assert len(set(keys(server))) == 1
    assert len(keys(server)[0]) >= 16


def test_two_creates_have_two_keys_and_the_callers_own_key_is_taken(either, server):
    server.will(accept)

    either.ask("create_job", "a red circle")
    either.ask("create_job", "a red circle")
    either.ask("create_job", "a red circle", idempotency_key="mine")

    assert len(set(keys(server))) == 3
    assert keys(server)[2] == "mine"


def test_a_lost_answer_makes_no_second_job(either, server):
    made = {}

    def make(request):
        return made.setdefault(
            request.headers["Idempotency-Key"], a_job(id=f"j{len(made) + 1}", state="queued")
        )

    def make_and_break(request):
        make(request)
        request.reset()

    server.will(make_and_break, make_and_break, lambda request: request.answer(202, make(request)))

    assert either.ask("create_job", "a red circle").id == "j1"
    assert len(made) == 1


def test_a_server_that_is_silent_for_too_long_is_asked_again(either, server):
    is_over = threading.Event()
    server.will(lambda request: is_over.wait(60), show)

    assert either.ask("job", "j1", timeout_s=0.3).id == "j1"
    assert len(server.requests) >= 2
    is_over.set()


def test_an_answer_that_breaks_off_is_asked_for_again(either, server):
    server.will(lambda request: request.answer(200, content=b'{"id": ', promised=500), show)

    assert either.ask("job", "j1").id == "j1"


@pytest.mark.parametrize("method", ["job", "cancel", "status", "delete", "replay"])
def test_whatever_may_be_repeated_is(either, server, method):
    server.will(
        lambda request: request.reset(),
        lambda request: request.answer(502, content=b"bad gateway"),
        show,
    )

    either.ask(method, "j1")

    assert len(server.requests) == 3


def test_a_proxy_of_the_environment_is_not_used_for_a_gateway_on_this_machine(
    either, server, monkeypatch
):
    set_proxy(monkeypatch, "http://127.0.0.1:1")
    server.will(show)

    assert either.ask("job", "j1").id == "j1"


def test_a_proxy_of_the_environment_is_used_for_any_other_gateway(either, server, monkeypatch):
    set_proxy(monkeypatch, server.url)
    server.will(show)
    either.url = "http://gateway.test"

    assert either.ask("job", "j1").id == "j1"
    assert server.requests[0].path == "http://gateway.test/v1/jobs/j1"


def set_proxy(monkeypatch, proxy):
    """Name this proxy in the environment, and no exceptions."""
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("HTTP_PROXY", proxy)


def test_retry_after_is_honoured(either, server):
    server.will(lambda request: saturated(request, Retry_After="1"), accept)

    either.ask("create_job", "a red circle")

    first, second = server.requests
    assert 1.0 <= second.at - first.at < 10


def test_a_retry_after_that_is_longer_than_the_client_waits_is_the_callers_to_decide(
    either, server
):
    server.will(lambda request: saturated(request, Retry_After="600"))

    with pytest.raises(ProblemError) as caught:
        either.ask("create_job", "a red circle")

    assert (caught.value.retry_after_s, caught.value.slug, len(server.requests)) == (
        600,
        "fleet-saturated",
        1,
    )


def test_retry_after_may_be_a_date(either, server):
    server.will(
        lambda request: saturated(request, Retry_After=formatdate(time.time() + 600, usegmt=True))
    )

    with pytest.raises(ProblemError) as caught:
        either.ask("create_job", "a red circle")

    assert caught.value.retry_after_s == pytest.approx(600, abs=5)


@pytest.mark.parametrize("retry_after", ["", "soon", "-5", "1e9", "Wed, 99 Foo 2026"])
def test_a_retry_after_that_makes_no_sense_is_none(either, server, retry_after):
    server.will(lambda request: saturated(request, Retry_After=retry_after), accept)

    assert either.ask("create_job", "a red circle").id == "j1"


def test_the_tries_end_and_the_last_refusal_is_told(either, server):
    server.will(saturated)

    with pytest.raises(ProblemError, match="Fleet saturated"):
        either.ask(
            "create_job", "a red circle", retries=Retries(attempts=3, initial_backoff_s=0.01)
        )

    assert len(server.requests) == 3


def test_the_tries_end_when_nobody_answers_and_their_number_is_told(either, server):
    server.will(lambda request: request.reset())

    with pytest.raises(Unreachable, match="does not answer after 4 tries"):
        either.ask("job", "j1")

    assert len(server.requests) == 4


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422, 500])
def test_a_refusal_that_time_does_not_cure_is_told_at_once(either, server, status):
    server.will(lambda request: request.answer(status, {"type": "/problems/p", "title": "No"}))

    with pytest.raises(ProblemError):
        either.ask("create_job", "a red circle")

    assert len(server.requests) == 1


def test_a_refusal_that_says_not_to_try_again_is_believed(either, server):
    server.will(
        lambda request: request.answer(
            429, {"type": "/problems/p", "title": "No"}, X_Should_Retry="false"
        )
    )

    with pytest.raises(ProblemError):
        either.ask("create_job", "a red circle")

    assert len(server.requests) == 1


def test_the_object_store_is_asked_again_too_and_without_the_key(either, server):
    broken = PNG[:4]
    server.will(
        lambda request: request.answer(
            302, {}, Location=f"{server.url}/bucket/image?X-Amz-Signature=s"
        ),
        lambda request: request.answer(503, content=b"SlowDown"),
        lambda request: request.answer(200, content=broken, promised=len(PNG)),
        lambda request: request.answer(200, content=PNG),
    )

    assert either.ask("image", a_read_job()) == PNG
    assert [request.headers["Authorization"] for request in server.requests] == [
        "Bearer dr_key",
        None,
        None,
        None,
    ]


def test_a_download_is_whole_or_not_there_and_is_not_fetched_twice(either, server, tmp_path):
    def store_has(content):
        def answer(request):
            if request.path.startswith("/bucket"):
                request.answer(200, content=content)
            else:
                request.answer(302, {}, Location=f"{server.url}/bucket/image")

        return answer

    server.will(store_has(b"other bytes"))
    with pytest.raises(DigestMismatch, match="11 bytes came that are not the stored ones"):
        either.ask("download", a_read_job(), tmp_path / "new")
    assert not (tmp_path / "new").exists()

    server.will(store_has(PNG))
    [path] = either.ask("download", a_read_job(), tmp_path / "new", names="{seed}-{index}")
    asked = len(server.requests)
    assert (path, path.read_bytes()) == (tmp_path / "new" / "7-0.png", PNG)
    assert either.ask("download", a_read_job(), tmp_path / "new", names="{seed}-{index}") == (path,)
    assert len(server.requests) == asked

    path.write_bytes(PNG[:-1])
    either.ask("download", a_read_job(), tmp_path / "new", names="{seed}-{index}")
    assert path.read_bytes() == PNG
    assert [entry.name for entry in path.parent.iterdir()] == ["7-0.png"]


def test_pictures_are_uploaded_once_before_the_request_that_names_them(either, server, tmp_path):
    (tmp_path / "cat.png").write_bytes(PNG)

    def answer(request):
        if request.path == "/v1/files":
            assert PNG in request.body or b"mask bytes" in request.body
            request.answer(201, {"id": hashlib.sha256(request.body[-200:]).hexdigest()})
        else:
            accept(request)

    server.will(lambda request: request.reset(), answer)

    either.ask(
        "create_job",
        "a red circle",
        init_image=tmp_path / "cat.png",
        mask=b"mask bytes",
        control_image="data:image/png;base64,xx",
    )

    said = json.loads(server.requests[-1].body)
    assert [request.path for request in server.requests] == [
        "/v1/files",
        "/v1/files",
        "/v1/files",
        "/v1/jobs",
    ]
    assert len({said["init_image"], said["mask"]}) == 2
    assert said["control_image"] == "data:image/png;base64,xx"


def test_pictures_of_a_batch_are_uploaded_once_however_many_jobs_name_them(
    either, server, tmp_path
):
    (tmp_path / "cat.png").write_bytes(PNG)
    uploads = iter(["file-1", "file-2", "file-3"])

    def answer(request):
        if request.path == "/v1/files":
            request.answer(201, {"id": next(uploads)})
        else:
            request.answer(202, {"data": [{"job": {"id": "j1"}}, {"problem": SATURATED}]})

    server.will(answer)

    jobs = [
        {"prompt": "a red circle", "init_image": tmp_path / "cat.png", "mask": b"mask bytes"},
        {
            "prompt": "a blue star",
            "init_image": tmp_path / "cat.png",
            "control_image": b"mask bytes",
        },
    ]
    made, refused = either.ask("create_jobs", jobs)

    assert [request.path for request in server.requests] == [
        "/v1/files",
        "/v1/files",
        "/v1/jobs:batch",
    ]
    first, second = json.loads(server.requests[-1].body)["jobs"]
    assert (
        (first["init_image"], first["mask"])
        == (second["init_image"], second["control_image"])
        == ("file-1", "file-2")
    )
    assert (made.job_id, made.problem, refused.job_id, refused.problem.slug) == (
        "j1",
        None,
        None,
        "fleet-saturated",
    )


def test_a_picture_that_is_not_there_is_told_before_anything_is_sent(either, server, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.png"):
        either.ask("create_job", "a red circle", init_image=str(tmp_path / "no.png"))

    assert server.requests == []


def stream(*blocks, promised=None):
    content = "".join(f"{block}\n\n" for block in blocks).encode()
    return lambda request: request.answer(
        200, content=content, promised=promised, Content_Type="text/event-stream; charset=utf-8"
    )


def test_events_go_on_where_the_connection_broke(either, server):
    server.will(
        stream(
            ": heartbeat",
            'id: 1\nevent: queued\ndata: {"jobs_ahead": 2}',
            'id: 2\nevent: step\ndata: {"step":\ndata: 1}',
            promised=900,
        ),
        lambda request: request.reset(),
        saturated,
        stream(
            ": heartbeat",
            'id: 3\nevent: final\ndata: {"state": "succeeded"}',
            "id: 4\nevent: step\ndata: {}",
        ),
    )

    events = either.ask("events", "j1")

    assert [(event.id, event.kind, dict(event.data)) for event in events] == [
        ("1", "queued", {"jobs_ahead": 2}),
        ("2", "step", {"step": 1}),
        ("3", "final", {"state": "succeeded"}),
    ]
    assert [request.headers["Last-Event-ID"] for request in server.requests] == [
        None,
        "2",
        "2",
        "2",
    ]


def test_events_begin_after_the_one_that_the_caller_names(either, server):
    server.will(stream('id: 8\nevent: final\ndata: {"state": "succeeded"}'))

    [event] = either.ask("events", "j1", after="7", previews=True)

    [request] = server.requests
    assert (event.id, request.headers["Last-Event-ID"], request.path) == (
        "8",
        "7",
        "/v1/jobs/j1/events?previews=true",
    )


def test_events_are_the_same_however_the_bytes_are_cut(monkeypatch):
    from darkroom_client.events import EventStream

    text = (
        ': hi\r\n\r\nid: 1\r\nevent: step\r\ndata: {"text": "\u2028 é"}\r\n\r\n\n'
        "data: no json\n\nid: 2\nevent: final\ndata: {}\n\n"
    )
    whole = text.encode()
    dice = random.Random(7)

    for _ in range(200):
        following = EventStream("j1", previews=False, after=None, retries=HASTY)
        cuts = sorted(dice.sample(range(len(whole)), 5))
        pieces = [
            whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)
        ]
        events = [event for piece in pieces for event in following.read(piece)]
        assert [(event.id, event.kind) for event in events] == [("1", "step"), ("2", "final")]
        assert events[0].data == {"text": "\u2028 é"}
        assert following.is_over


def test_events_that_never_come_end_in_an_error(either, server):
    server.will(lambda request: request.reset())

    with pytest.raises(Unreachable, match="the events of job j1 cannot be read, after 4 tries"):
        either.ask("events", "j1")


def test_events_of_a_job_that_is_not_there_are_refused_as_anything_else_is(either, server):
    server.will(
        lambda request: request.answer(
            404, {"type": "/problems/job-not-found", "title": "Job not found"}
        )
    )

    with pytest.raises(ProblemError) as caught:
        either.ask("events", "j1")

    assert (caught.value.slug, len(server.requests)) == ("job-not-found", 1)


def test_pauses_grow_and_are_never_the_same_for_everybody():
    retries = Retries(attempts=9, initial_backoff_s=1, max_backoff_s=8)

    for attempt, longest in [(1, 1), (2, 2), (3, 4), (4, 8), (8, 8)]:
        pauses = [retries.pause_s(attempt) for _ in range(300)]
        assert longest * 0.9 < max(pauses) <= longest
        assert min(pauses) < longest * 0.1
    assert retries.pause_s(9) is None


def test_the_clients_have_the_same_methods_that_take_the_same():
    def methods(kind):
        return {
            name: inspect.signature(method).parameters
            for name, method in vars(kind).items()
            if not name.startswith("_")
        }

    assert {name: list(taken.values()) for name, taken in methods(Client).items()} == {
        name: list(taken.values()) for name, taken in methods(AsyncClient).items()
    }


def a_read_job():
    from darkroom_client import Job

    return Job.from_json(a_job())
