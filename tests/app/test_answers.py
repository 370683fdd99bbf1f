"""Real answers of the whole stack beside the served document, its schemas closed.

No member is missing in either.
"""

import json
import uuid
from datetime import UTC, datetime
from types import SimpleNamespace

import httpx
import pytest
from sqlalchemy import select

from models import api_keys, budgets, jobs, tenants, webhooks
from models.database import transaction
from models.tables import Job, WebhookDelivery
from policy.failures import FailureCode
from policy.states import JobState
from policy.webhooks import BUDGET_EVENT, ENDED_EVENTS, EVENTS, TEST_EVENT
from tasks.deliver import message
from tests.app.conftest import bearer
from tests.app.test_event_streams import events_of
from tests.app.witness import Witness
from tests.builders import a_job, a_tenant, spend, until
from tests.receivers import a_receiver

PROMPT = "a large red circle in the center on a blue background"
LONG = PROMPT + ", very detailed picture" * 20
WAIT = {"Prefer": "wait=60"}
DOT = "data:image/webp;base64,UklGRh4AAABXRUJQVlA4TBEAAAAvAUAAAAdQjyLXo/+BiOh/AAA="
NOBODY = str(uuid.UUID(int=7))


@pytest.fixture(scope="module")
def witness(nobody) -> Witness:
    return Witness(nobody.get("/openapi.json").json())


@pytest.fixture(scope="module")
def house(stack, stack_database, witness):
    """HTTP as a tenant whose key has every scope.

    The witness looks at every answer that is no stream.
    """

    def look(answer):
        if (
            not answer.headers.get("Content-Type", "").startswith("text/event-stream")
            and answer.request.url.path != "/openapi.json"
        ):
            witness.look(answer)

    with transaction(stack_database) as session:
        tenant = tenants.create(session, name=f"app-{uuid.uuid4().hex[:8]}", actor="tests")
        own = {
            "tenant_id": tenant.id,
            "name": "all",
            "pepper": stack.env["API_KEY_PEPPER"],
            "actor": "tests",
        }
        _, key = api_keys.issue(session, scopes=["admin", "generate", "read"], **own)
    hooks = {"response": [look]}
    with httpx.Client(
        base_url=stack.env["DARKROOM_URL"],
        headers=bearer(key),
        timeout=90,
        trust_env=False,
        event_hooks=hooks,
    ) as client:
        client.tenant_id = tenant.id
        yield client


def render(house, **job_body) -> dict:
    job = house.post(
        "/v1/jobs",
        json={"prompt": PROMPT, "tier": "fast", "steps": 2, "seed": 7, **job_body},
        headers=WAIT,
    ).json()
    assert job["state"] == "succeeded", job
    return job


@pytest.fixture(scope="module")
def job(house) -> dict:
    return render(house, n=2, metadata={"order": "7"})


def test_answers_about_jobs_are_as_described(house, job):
    assert house.get(job["urls"]["self"]).json()["metadata"] == {"order": "7"}
    house.get(job["urls"]["status"])
    page = house.get("/v1/jobs", params={"limit": 1, "metadata.order": "7"}).json()
    assert [shown["id"] for shown in page["data"]] == [job["id"]]
    house.post(job["urls"]["cancel"])
    house.post(job["urls"]["replay"], headers=WAIT)
    [warning] = render(house, prompt=LONG)["warnings"]
    assert warning["tokens_given"] > warning["tokens_read"]
    waiting = house.post(
        "/v1/jobs",
        json={"prompt": PROMPT, "tier": "batch", "negative_prompt": "a star", "guidance": 1.0},
    ).json()
    assert waiting["queue"] is not None
    assert waiting["progress"] is None
    assert "tokens_given" not in waiting["warnings"][0]
    assert house.post(waiting["urls"]["cancel"]).json()["state"] == "canceled"
    house.delete(waiting["urls"]["self"])
    erased = house.get(waiting["urls"]["self"]).json()
    assert erased["prompt"] is None
    assert erased["erased_at"] == house.get(waiting["urls"]["status"]).json()["erased_at"]
    assert erased["erased_at"] is not None
    image = f"{job['urls']['self']}/images/0"
    assert [
        house.get(image).status_code,
        house.get(image, params={"redirect": "false"}).status_code,
    ] == [302, 200]


def test_the_times_of_a_job_add_up_to_its_whole_time(job):
    timing = job["timing"]

    parts = timing["queue_s"] + timing["render_s"] + timing["store_s"]
    assert timing["total_s"] == pytest.approx(parts, abs=0.001)
    assert timing["queue_s"] > 0


def test_answers_about_what_may_become_a_job_are_as_described(house):
    body = {"prompt": PROMPT, "tier": "batch", "steps": 4, "metadata": {"a": "b"}}
    items = [{}, {"steps": 0}, {"nonsense": 1}, "no object", {"\u0000": 1}]
    batch = house.post(
        "/v1/jobs:batch",
        content=json.dumps({"defaults": body, "jobs": items}),
        headers={"Content-Type": "application/json"},
    )

    assert [item["status"] for item in batch.json()["data"]] == [202, 422, 422, 422, 422]
    assert batch.json()["data"][4]["problem"]["errors"][0]["pointer"] == "/\u0000"
    house.post("/v1/estimate", json=body)
    house.post(
        "/v1/estimate",
        json={**body, "seed": 7, "init_image": DOT, "negative_prompt": "a star", "guidance": 0.5},
    )


def test_an_estimate_that_says_why_not_is_as_described(witness, a_house):
    answer = a_house().tenant().send("/v1/estimate", {"prompt": PROMPT, "tier": "batch"})

    assert answer.json["refusal"]["type"] == "/problems/model-unserved"
    witness.look_at(
        ("POST", "/v1/estimate"),
        answer.status_code,
        answer.content_type,
        lambda: answer.json,
    )


def test_answers_about_pictures_are_as_described(house, job):
    content = house.get(f"{job['urls']['self']}/images/0", params={"redirect": "false"}).content
    file = house.post("/v1/files", files={"file": ("a.png", content, "image/png")}).json()
    house.get("/v1/files", params={"limit": 1})
    house.get(file["urls"]["self"])
    house.get(file["url"])
    shown = render(house, init_image=file["id"], mask=None, strength=0.6)
    pictures = {name: shown[name] for name in ("init_image", "mask", "control_image")}
    assert pictures == {"init_image": file["id"], "mask": None, "control_image": None}
    house.delete(file["urls"]["self"])


def test_events_of_a_job_are_as_described(house, witness):
    job = house.post(
        "/v1/jobs", json={"prompt": PROMPT, "tier": "quality", "steps": 30, "seed": 7}
    ).json()

    with house.stream("GET", job["urls"]["events"], params={"previews": "true"}) as answer:
        told = [(kind, data) for _, kind, data in events_of(answer) if kind]

    witness.look_at_events(("GET", "/v1/jobs/{job_id}/events"), told)
    assert {kind for kind, _ in told} >= {"started", "step", "preview", "stored", "final"}


def test_an_event_of_a_job_that_waits_is_as_described(house, witness, a_house):
    waiting = a_house().with_workers().tenant()
    job = waiting.post().json

    answer = waiting._http.get(job["urls"]["events"], headers=waiting._headers)
    lines = iter(answer.response)
    text = "".join(next(lines).decode() for _ in range(2))
    answer.close()

    name, data = (line.partition(": ")[2] for line in text.strip().splitlines()[-2:])
    witness.look_at_events(("GET", "/v1/jobs/{job_id}/events"), [(name, json.loads(data))])
    assert name == "queued"


@pytest.mark.parametrize("user", [{}, {"user": "somebody"}])
def test_answers_in_the_words_of_openai_are_as_described(house, user):
    job_body = {"prompt": PROMPT, "size": "128x128", "steps": 2, "tier": "fast", **user}
    for response_format in ("b64_json", "url"):
        house.post(
            "/v1/images/generations",
            json={**job_body, "response_format": response_format, "n": 2, "quality": "high"},
        )
    edited = house.post("/v1/images/edits", json={**job_body, "images": [{"image_url": DOT}]})
    assert edited.json()["quality"] is None
    house.post(
        "/v1/images/variations",
        json={"images": [{"image_url": DOT}], "steps": 2, "tier": "fast", **user},
    )


@pytest.mark.parametrize("user", [{}, {"user": "somebody"}])
@pytest.mark.parametrize(
    ("path", "picture"),
    [("/v1/images/generations", {}), ("/v1/images/edits", {"images": [{"image_url": DOT}]})],
)
def test_events_in_the_words_of_openai_are_as_described(house, witness, path, picture, user):
    job_body = {
        "prompt": PROMPT,
        "steps": 20,
        "tier": "quality",
        "stream": True,
        "partial_images": 2,
        **picture,
        **user,
    }
    with house.stream("POST", path, json=job_body) as answer:
        data = [
            line.removeprefix("data: ")
            for line in answer.iter_lines()
            if line.startswith("data: {")
        ]

    told = [json.loads(each) for each in data]
    witness.look_at_events(
        ("POST", path),
        [(each["type"].rpartition(".")[2], each) for each in told],
    )
    assert {"completed"} <= {each["type"].rpartition(".")[2] for each in told}


def test_the_error_that_ends_a_stream_is_as_described(house, witness):
    with house.stream(
        "POST",
        "/v1/images/generations",
        json={"prompt": PROMPT, "steps": 60, "tier": "quality", "stream": True},
    ) as answer:
        house.post(f"/v1/jobs/{answer.headers['X-Darkroom-Job-Id']}/cancel")
        [data] = [
            json.loads(line.removeprefix("data: "))
            for line in answer.iter_lines()
            if line.startswith("data: {")
        ]

    assert data["type"] == "error"
    witness.look_at_events(("POST", "/v1/images/generations"), [("error", data)])


def test_answers_about_webhooks_and_their_messages_are_as_described(house, witness):
    with a_receiver() as receiver:
        endpoint = house.post(
            "/v1/webhooks", json={"url": receiver.url, "description": "orders"}
        ).json()
        own = endpoint["urls"]["self"]
        house.get("/v1/webhooks")
        house.get(own)
        house.patch(own, json={"events": ["job.succeeded", "job.canceled"]})
        house.post(f"{own}/rotate")
        sent = house.post(f"{own}/test").json()
        render(house)
        until(lambda: len(receiver.heard) == 2)
        house.post(f"/v1/webhooks/deliveries/{sent['id']}/redeliver")
        until(lambda: len(receiver.heard) == 3)
        assert house.get(f"{own}/deliveries").json()["data"][-1]["attempts"]
        for heard in receiver.heard:
            witness.look_at_message(heard.message)
        house.delete(own)


@pytest.mark.parametrize("event", ENDED_EVENTS)
def test_a_message_about_each_end_is_as_described(witness, stack_database, job, event):
    """One body is made of every row.

    What differs is the state, the failure and the images that are not there.
    """
    with transaction(stack_database) as session:
        row = session.get(Job, uuid.UUID(job["id"]))
        found = jobs.find(session, row.id, tenant_id=row.tenant_id)
    state = event.removeprefix("job.")
    facts = {column.key: getattr(found, column.key) for column in Job.__mapper__.column_attrs}
    if state != JobState.SUCCEEDED:
        images = [SimpleNamespace(index=0, seed=7, state="pending", artifact=None)]
        code = FailureCode.INTERNAL if state in ("failed", "rejected") else None
        facts |= {
            "failure_code": code,
            "cost": None,
            "started_at": None,
            "labels": None,
            "images": images,
        }
    else:
        facts["images"] = found.images
    ended = SimpleNamespace(**facts | {"state": state})

    told = message(
        SimpleNamespace(event=event, data=None),
        ended,
        datetime.now(UTC),
        public_url="https://images.example",
    )

    witness.look_at_message(json.loads(json.dumps(told)))


def test_a_message_about_a_budget_is_as_described(witness, stack_database):
    with transaction(stack_database) as session:
        tenant = a_tenant(session)
        own = {"url": "https://example.com/", "description": "", "secret": "whsec_AAAA"}
        webhooks.create(session, tenant_id=tenant.id, events=[BUDGET_EVENT], **own, actor="tests")
        spend(session, tenant, budget=10, cost=8)
        budgets.note_reached_thresholds(session, currency="USD")
        [delivery] = session.scalars(
            select(WebhookDelivery).where(WebhookDelivery.tenant_id == tenant.id)
        )
        claim = webhooks.claim(session, delivery.id)
        session.rollback()

    told = message(claim, None, datetime.now(UTC))

    assert told["data"]["percent"] == 80
    witness.look_at_message(json.loads(json.dumps(told)))


def test_answers_about_what_there_is_and_was_used_are_as_described(house):
    house.get("/v1/models")
    house.get("/v1/models/pocket")
    assert house.get("/v1/models/dall-e-3").json()["alias_of"] == "pocket"
    house.get("/v1/tiers")
    house.get("/v1/key")
    days = {"from": "2026-01-01", "to": datetime.now(UTC).date().isoformat()}
    usage = house.get("/v1/usage", params=days).json()
    assert usage["data"]
    assert {name: usage[name] for name in days} == days
    house.get("/v1")
    house.get("/healthz")
    house.get("/readyz")
    assert house.get("/problems/not-found").json()["about"]


def test_readiness_that_is_lost_is_as_described(witness, gateway_with, elsewhere):
    gateway = gateway_with(**elsewhere("database"))
    answer = until(
        lambda: (
            (answer := gateway.get("/readyz")).json["parts"]["database"].get("detail")
            != "not asked yet"
            and answer
        )
    )

    assert answer.status_code == 503
    witness.look_at(("GET", "/readyz"), 503, answer.content_type, lambda: answer.json)


def test_answers_to_an_operator_are_as_described(house):
    tenant = house.post("/v1/admin/tenants", json={"name": f"app-{uuid.uuid4().hex[:8]}"}).json()
    own = f"/v1/admin/tenants/{tenant['id']}"
    limits = {
        "requests_per_minute": 60,
        "daily_megapixel_steps": 1.5,
        "allowed_tiers": ["batch"],
        "max_stored_bytes": 7,
    }
    assert house.patch(own, json=limits).json()["limits"]["daily_megapixel_steps"] == 1.5
    house.get(own)
    house.get("/v1/admin/tenants", params={"limit": 1})
    key = house.post(f"{own}/keys", json={"expires_at": "2099-01-31T00:00:00Z"}).json()
    rotated = house.post(f"/v1/admin/keys/{key['id']}/rotate", json={}).json()
    house.delete(f"/v1/admin/keys/{rotated['id']}")
    house.get(f"{own}/keys")
    house.get(f"{own}/usage")
    house.get(f"/v1/admin/tenants/{house.tenant_id}/usage")


REFUSALS = [
    ("POST", "/v1/jobs", {"json": {"steps": 0}}),
    (
        "POST",
        "/v1/jobs",
        {"json": {"prompt": PROMPT, **{f"field{number}": 1 for number in range(30)}}},
    ),
    ("POST", "/v1/jobs", {"content": b"{", "headers": {"Content-Type": "application/json"}}),
    ("POST", "/v1/jobs", {"content": b"{}"}),
    ("POST", "/v1/jobs", {"json": {"prompt": PROMPT}, "headers": {"Idempotency-Key": ""}}),
    ("GET", "/v1/jobs", {"params": {"limit": 0}}),
    ("GET", "/v1/jobs", {"params": {"state": "lost"}}),
    ("GET", f"/v1/jobs/{NOBODY}", {}),
    ("GET", f"/v1/jobs/{NOBODY}", {"headers": {"Prefer": "wait=soon"}}),
    ("POST", "/v1/files", {"content": b"no picture", "headers": {"Content-Type": "image/png"}}),
    ("POST", "/v1/images/generations", {"json": {"prompt": PROMPT, "model": "no-such"}}),
    ("POST", "/v1/images/generations", {"json": {"prompt": PROMPT, "svg": True}}),
    ("POST", "/v1/images/edits", {"json": {"prompt": PROMPT}}),
    ("GET", "/v1/models/no-such", {}),
    ("GET", "/v1/usage", {"params": {"from": "tomorrow"}}),
    ("POST", "/v1/webhooks", {"json": {"url": "http://169.254.169.254/"}}),
    ("GET", "/problems/no-such", {}),
]


@pytest.mark.parametrize(("method", "path", "options"), REFUSALS)
def test_refusals_are_as_described(house, method, path, options):
    assert 400 <= house.request(method, path, **options).status_code < 500


def test_refusals_that_say_more_are_as_described(house, job, stack_database):
    house.post(job["urls"]["cancel"])
    with transaction(stack_database) as session:
        tenant = session.get(tenants.Tenant, house.tenant_id)
        a_job(session, tenant=tenant)
        tenants.limit(session, tenant, changes={"max_concurrent_jobs": 1}, actor="tests")
    body = {"prompt": PROMPT, "tier": "batch"}
    refused = until(
        lambda: (answer := house.post("/v1/jobs", json=body)).status_code == 429 and answer
    ).json()
    assert refused["max_concurrent_jobs"] == 1
    with transaction(stack_database) as session:
        tenants.limit(
            session,
            session.get(tenants.Tenant, house.tenant_id),
            changes={"max_concurrent_jobs": None},
            actor="tests",
        )


def test_without_a_key_every_operation_refuses_as_described(witness, nobody):
    for method, path in witness.operations:
        if witness.operations[method, path].get("security") == []:
            continue
        answer = nobody.request(
            method,
            path.replace("{index}", "0").replace("{job_id}", NOBODY).format_map(_Ids()),
        )
        assert answer.status_code == 401, (method, path)
        witness.look(answer)


class _Ids(dict):
    def __missing__(self, name: str) -> str:
        return "pocket" if name == "name" else NOBODY


def test_every_operation_event_and_message_was_seen(witness):
    """The last of this module: nothing in the document went unseen."""
    assert set(witness.operations) - witness.good == set()
    assert witness.events["/v1/jobs/{job_id}/events"] == {
        "queued",
        "started",
        "step",
        "preview",
        "stored",
        "final",
    }
    assert witness.events["/v1/images/generations"] == {"partial_image", "completed", "error"}
    assert witness.events["webhooks"] == {*EVENTS, TEST_EVENT}
