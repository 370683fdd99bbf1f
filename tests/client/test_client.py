"""The client against a gateway and an object store that are played by a function."""

import hashlib
from datetime import UTC, datetime, timedelta, timezone

import httpx
import pytest

from darkroom_client import (
    Client,
    DigestMismatch,
    ImageNotStored,
    ProblemError,
    Retries,
    UnexpectedAnswer,
    Unreachable,
    WaitTimeout,
    __version__,
)

PNG = b"\x89PNG and so on"


def a_job(**changes):
    image = {
        "index": 0,
        "seed": 7,
        "state": "stored",
        "url": "/v1/jobs/j1/images/0",
        "pixels_sha256": "0" * 64,
        "content_sha256": hashlib.sha256(PNG).hexdigest(),
        "content_type": "image/png",
        "size_bytes": len(PNG),
        "width_px": 128,
        "height_px": 128,
    }
    job = {
        "id": "j1",
        "object": "job",
        "state": "succeeded",
        "tier": "fast",
        "model": "pocket",
        "model_version": "1",
        "prompt": "a red circle",
        "negative_prompt": "",
        "size": "128x128",
        "steps": 4,
        "guidance": 4.0,
        "sampler": "ddim",
        "seed": 7,
        "n": 1,
        "output_format": "png",
        "precision": "fp32",
        "determinism": "best_effort",
        "bucket_rows": None,
        "attempt": 1,
        "failure": None,
        "created_at": "2026-11-21T23:00:00+00:00",
        "started_at": "2026-11-21T23:00:01+00:00",
        "rendered_at": "2026-11-21T23:00:02+00:00",
        "finished_at": "2026-11-21T23:00:03+00:00",
        "start_by": "2026-11-21T23:10:00+00:00",
        "progress": None,
        "timing": {"queue_s": 1.0, "render_s": 1.0, "store_s": 1.0, "total_s": 3.0},
        "cost": {"gpu_seconds": 0.5, "amount": "0.000333", "currency": "USD"},
        "images": [image],
        "urls": {"self": "/v1/jobs/j1", "cancel": "/v1/jobs/j1/cancel"},
    }
    return job | changes


def a_client(answer):
    """A client whose every request is answered by `answer(request)`.

    The requests are kept in `client.seen`.
    """
    seen = []

    def play(request):
        seen.append(request)
        return answer(request)

    client = Client(
        "http://gateway.test",
        "dr_key",
        retries=Retries(attempts=1),
        transport=httpx.MockTransport(play),
    )
    client.seen = seen
    return client


def test_a_job_is_asked_for_with_what_was_said_and_nothing_else():
    client = a_client(lambda request: httpx.Response(202, json=a_job(state="queued")))

    job = client.create_job("a red circle", tier="fast", seed=7)

    request = client.seen[0]
    assert (request.method, request.url.path) == ("POST", "/v1/jobs")
    assert request.headers["Authorization"] == "Bearer dr_key"
    assert request.headers["User-Agent"].startswith(f"darkroom-client/{__version__} ")
    assert request.read() == b'{"prompt":"a red circle","tier":"fast","seed":7}'
    assert (job.id, job.state, job.is_finished, job.cost.amount) == (
        "j1",
        "queued",
        False,
        "0.000333",
    )


def test_members_of_a_later_version_are_kept_and_do_no_harm():
    client = a_client(lambda request: httpx.Response(200, json=a_job(mood="bright")))

    assert client.job("j1").members["mood"] == "bright"


def test_a_refusal_tells_each_wrong_field():
    problem = {
        "type": "/problems/invalid-image-request",
        "title": "Invalid image request",
        "status": 422,
        "detail": "steps must be from 1 to 20",
        "instance": "/requests/r1",
        "errors": [
            {
                "pointer": "/steps",
                "detail": "must be from 1 to 20",
                "accepted": {"min": 1, "max": 20},
            }
        ],
    }
    client = a_client(
        lambda request: httpx.Response(
            422, json=problem, headers={"Content-Type": "application/problem+json"}
        )
    )

    with pytest.raises(ProblemError) as caught:
        client.create_job("a red circle", steps=900)

    error = caught.value
    assert (error.status, error.type, error.request_id) == (
        422,
        "/problems/invalid-image-request",
        "/requests/r1",
    )
    assert [(field.pointer, field.accepted) for field in error.errors] == [
        ("/steps", {"min": 1, "max": 20})
    ]


def test_a_refusal_for_now_says_when_to_come_back():
    problem = {
        "type": "/problems/fleet-saturated",
        "title": "Fleet saturated",
        "status": 503,
        "detail": "Later.",
    }
    client = a_client(
        lambda request: httpx.Response(503, json=problem, headers={"Retry-After": "12"})
    )

    with pytest.raises(ProblemError) as caught:
        client.create_job("a red circle")

    assert caught.value.retry_after_s == 12


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>welcome</html>"),
        httpx.Response(502, text="bad gateway"),
        httpx.Response(200, json={"id": "j1"}),
    ],
    ids=["html", "proxy", "no job"],
)
def test_an_answer_that_is_not_ours_is_said_to_be_so(answer):
    client = a_client(lambda request: answer)

    with pytest.raises(UnexpectedAnswer, match=r"gateway\.test"):
        client.job("j1")


def test_a_gateway_that_is_not_there_is_unreachable():
    with (
        Client("http://127.0.0.1:1", "dr_key") as client,
        pytest.raises(Unreachable, match=r"127\.0\.0\.1:1"),
    ):
        client.tiers()


def test_lists_are_followed_from_page_to_page():
    pages = {
        None: {
            "object": "list",
            "data": [a_job(id="j3"), a_job(id="j2")],
            "has_more": True,
            "next_cursor": "c1",
        },
        "c1": {"object": "list", "data": [a_job(id="j1")], "has_more": False, "next_cursor": None},
    }
    client = a_client(
        lambda request: httpx.Response(200, json=pages[request.url.params.get("cursor")])
    )

    assert [job.id for job in client.jobs(state="succeeded", page_size=2)] == ["j3", "j2", "j1"]
    assert dict(client.seen[1].url.params) == {"state": "succeeded", "limit": "2", "cursor": "c1"}


def test_list_of_jobs_is_asked_for_with_every_filter_and_instants_in_utc():
    client = a_client(
        lambda request: httpx.Response(
            200, json={"object": "list", "data": [], "has_more": False, "next_cursor": None}
        )
    )
    noon_in_tokyo = datetime(2026, 11, 21, 12, tzinfo=timezone(timedelta(hours=9)))

    assert (
        list(
            client.jobs(
                since=noon_in_tokyo,
                until=datetime(2026, 11, 22, tzinfo=UTC),
                metadata={"order": "7"},
            )
        )
        == []
    )

    assert dict(client.seen[0].url.params) == {
        "created_after": "2026-11-21T03:00:00+00:00",
        "created_before": "2026-11-22T00:00:00+00:00",
        "metadata.order": "7",
        "limit": "50",
    }


def test_an_image_is_fetched_from_the_store_without_the_key():
    def answer(request):
        if request.url.host == "store.test":
            return httpx.Response(200, content=PNG)
        return httpx.Response(
            302, headers={"Location": "http://store.test/bucket/key?X-Amz-Signature=s"}
        )

    client = a_client(answer)

    assert client.image(client_job(), 0) == PNG
    assert [request.url.host for request in client.seen] == ["gateway.test", "store.test"]
    assert "Authorization" not in client.seen[1].headers


def test_bytes_that_are_not_the_stored_ones_are_refused():
    def answer(request):
        is_store = request.url.host == "store.test"
        return (
            httpx.Response(200, content=b"other")
            if is_store
            else httpx.Response(302, headers={"Location": "http://store.test/key"})
        )

    with pytest.raises(DigestMismatch):
        a_client(answer).image(client_job(), 0)


def test_an_image_that_is_not_stored_is_not_asked_for():
    client = a_client(lambda request: httpx.Response(200, json=a_job(state="running", images=[])))

    with pytest.raises(ImageNotStored, match="running"):
        client.image("j1", 0)


def test_waiting_reports_progress_until_the_job_is_finished():
    states = iter(["queued", "running", "succeeded"])
    client = a_client(lambda request: httpx.Response(200, json=a_job(state=next(states))))
    seen = []

    job = client.wait("j1", timeout_s=10, on_progress=lambda job: seen.append(job.state))

    assert (job.state, seen) == ("succeeded", ["queued", "running", "succeeded"])


def test_waiting_without_a_listener_lets_the_gateway_hold_the_answer():
    client = a_client(lambda request: httpx.Response(200, json=a_job()))

    client.wait("j1", timeout_s=300)

    assert client.seen[0].headers["Prefer"] == "wait=30"


@pytest.mark.parametrize(
    ("ask", "allowed_s"),
    [
        (lambda client: client.job("j1"), 30),
        (lambda client: client.job("j1", 20), 30 + 20),  # the gateway holds this answer
        (lambda client: client.wait("j1", timeout_s=300), 30 + 30),
        (lambda client: client.create_jobs([{"prompt": "a red circle"}]), 30 + 90),
        (lambda client: client.upload(PNG), 30 + 90),
        (lambda client: list(client.events("j1")), 30 + 15),  # a heartbeat comes every 10 s
        (lambda client: client.image(client_job()), 2 * 30),
    ],
    ids=["job", "held", "wait", "batch", "upload", "events", "store"],
)
def test_silence_is_allowed_for_as_long_as_an_answer_may_take(ask, allowed_s):
    def answer(request):
        if request.url.host == "store.test":
            return httpx.Response(200, content=PNG)
        if "images" in request.url.path:
            return httpx.Response(302, headers={"Location": "http://store.test/key"})
        if request.url.path.endswith("/events"):
            return httpx.Response(
                200,
                text="event: final\ndata: {}\n\n",
                headers={"Content-Type": "text/event-stream"},
            )
        return httpx.Response(200, json=a_job() | {"data": []})

    client = a_client(answer)
    ask(client)

    allowed = client.seen[-1].extensions["timeout"]
    assert allowed["read"] == allowed_s
    assert client.seen[0].extensions["timeout"]["connect"] == 10


def test_waiting_ends_at_its_limit_and_shows_the_job_as_it_is():
    client = a_client(lambda request: httpx.Response(200, json=a_job(state="running")))

    with pytest.raises(WaitTimeout, match="running") as caught:
        client.wait("j1", timeout_s=0)

    assert caught.value.job.id == "j1"


@pytest.mark.parametrize("told", ["../../etc/x", "a/b", "..", "", "a\x00b", "C:x", 7])
def test_an_id_that_would_lead_elsewhere_is_no_job_whoever_answers(told, tmp_path):
    client = a_client(lambda request: httpx.Response(200, json=a_job(id=told)))

    with pytest.raises(UnexpectedAnswer):
        client.download("j1", tmp_path)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("member", ["index", "seed"])
def test_a_number_that_is_none_does_not_become_part_of_a_name(member, tmp_path):
    job = a_job()
    job["images"][0][member] = "../../x"
    client = a_client(lambda request: httpx.Response(200, json=job))

    with pytest.raises(UnexpectedAnswer):
        client.download("j1", tmp_path)


@pytest.mark.parametrize(
    ("content_type", "output_format", "suffix"),
    [("image/x/../..", "png", "png"), (None, "../../sh", "bin")],
)
def test_the_end_of_a_name_is_one_of_ours(content_type, output_format, suffix, tmp_path):
    job = a_job(output_format=output_format)
    job["images"][0]["content_type"] = content_type

    def answer(request):
        return (
            httpx.Response(200, content=PNG)
            if "images" in request.url.path
            else httpx.Response(200, json=job)
        )

    [path] = a_client(answer).download("j1", tmp_path)

    assert (path.parent, path.suffix) == (tmp_path, f".{suffix}")


def test_an_image_that_comes_through_the_gateway_is_taken_from_there():
    client = a_client(lambda request: httpx.Response(200, content=PNG))

    assert client.image(client_job()) == PNG
    assert [request.url.path for request in client.seen] == ["/v1/jobs/j1/images/0"]


@pytest.mark.parametrize("store", ["away", "refuses"])
def test_where_the_store_is_of_no_use_the_gateway_brings_the_image_and_the_next_ones(store):
    def answer(request):
        if request.url.host != "store.test":
            is_direct = request.url.params.get("redirect") == "false"
            return (
                httpx.Response(200, content=PNG)
                if is_direct
                else httpx.Response(302, headers={"Location": "http://store.test/key"})
            )
        if store == "away":
            raise httpx.ConnectError("refused")
        return httpx.Response(403)

    client = a_client(answer)

    assert [client.image(client_job()), client.image(client_job())] == [PNG, PNG]
    first = ["gateway.test", "store.test", "gateway.test"]
    assert [request.url.host for request in client.seen] == first + (
        ["gateway.test"] if store == "away" else first
    )


def test_with_a_gateway_that_always_redirects_the_store_s_refusal_is_the_error():
    def answer(request):
        is_store = request.url.host == "store.test"
        return (
            httpx.Response(403)
            if is_store
            else httpx.Response(302, headers={"Location": "http://store.test/key"})
        )

    with pytest.raises(UnexpectedAnswer, match="the object store answered 403"):
        a_client(answer).image(client_job())


def test_a_job_has_a_warning_for_text_that_the_model_did_not_read():
    warning = {
        "code": "prompt_truncated",
        "field": "prompt",
        "detail": "The model reads less.",
        "tokens_given": 30,
        "tokens_read": 22,
    }
    client = a_client(lambda request: httpx.Response(200, json=a_job(warnings=[warning])))

    [told] = client.job("j1").warnings

    assert (told.code, told.field, told.detail) == (
        "prompt_truncated",
        "prompt",
        "The model reads less.",
    )
    assert client_job().warnings == ()


def test_the_client_imports_nothing_of_the_house():
    import subprocess
    import sys

    rooms = (
        "{'app', 'cli', 'dispatch', 'edges', 'engine', 'fleet', 'migrations', 'models', 'policy', "
        "'settings', 'tasks'}"
    )
    program = (
        "import sys, darkroom_client; "
        f"print(sorted({rooms} & {{name.partition('.')[0] for name in sys.modules}}))"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "[]"


def client_job():
    from darkroom_client import Job

    return Job.from_json(a_job())


def test_a_job_is_read_with_all_that_it_tells():
    told = a_job(
        prompt_tokens=30,
        truncated_tokens=8,
        adapters=[{"name": "sepia", "strength": 0.5}],
        megapixel_steps=0.065536,
        run_by=None,
        erased_at="2026-11-22T00:00:00+00:00",
        metadata={"order": "7"},
    )

    job = a_client(lambda request: httpx.Response(200, json=told)).job("j1")

    assert [dict(adapter) for adapter in job.adapters] == told["adapters"]
    assert (job.precision, job.bucket_rows, job.megapixel_steps) == ("fp32", None, 0.065536)
    assert (job.rendered_at - job.started_at).total_seconds() == 1
    assert (job.start_by - job.created_at).total_seconds() == 600
    assert (job.run_by, job.erased_at.day) == (None, 22)
    assert (job.prompt_tokens, job.truncated_tokens) == (30, 8)
    assert (job.urls["cancel"], job.metadata) == ("/v1/jobs/j1/cancel", {"order": "7"})
    assert (job.timing.total_s, job.cost.amount, job.images[0].seed) == (3.0, "0.000333", 7)


@pytest.mark.parametrize(
    "name", ["id", "state", "tier", "model", "size", "steps", "seed", "images", "created_at"]
)
def test_a_job_that_lacks_a_member_is_an_unexpected_answer(name):
    members = a_job()
    del members[name]

    with pytest.raises(UnexpectedAnswer):
        a_client(lambda request: httpx.Response(200, json=members)).job("j1")


@pytest.mark.parametrize(
    "name",
    ["adapters", "metadata", "precision", "bucket_rows", "start_by", "urls", "cost", "timing"],
)
def test_a_member_that_an_older_gateway_does_not_tell_is_none_or_empty(name):
    members = a_job()
    members.pop(name, None)

    job = a_client(lambda request: httpx.Response(200, json=members)).job("j1")

    assert not getattr(job, name) or name == "timing"
    assert name != "timing" or job.timing.total_s is None


def test_an_estimate_is_read_with_every_parameter_and_no_seed_that_is_not_drawn_yet():
    told = a_job(seed=None, can_be_served=True, megapixel_steps=0.5, start_deadline_s=30.0)
    told |= {"refusal": None, "adapters": [], "metadata": {"a": "b"}, "queue": None}

    estimate = a_client(lambda request: httpx.Response(200, json=told)).estimate("a red circle")

    assert (estimate.seed, estimate.prompt, estimate.output_format) == (None, "a red circle", "png")
    assert (estimate.can_be_served, estimate.start_deadline_s) == (True, 30.0)
    assert (estimate.adapters, estimate.metadata) == ((), {"a": "b"})


def test_a_seed_that_is_no_number_is_no_job_for_it_names_files():
    with pytest.raises(UnexpectedAnswer):
        a_client(lambda request: httpx.Response(200, json=a_job(seed="../../x"))).job("j1")
