"""/v1/webhooks, from an endpoint to what arrives there, with real receivers."""

import base64
import hashlib
import hmac
import uuid
from datetime import UTC, datetime
from types import SimpleNamespace

import openai
import pytest
from sqlalchemy import text
from standardwebhooks import Webhook

from app.http.webhooks import EndpointBody
from models import jobs
from models.database import transaction
from models.webhooks import AT_ONCE_PER_TENANT
from policy.states import DeliveryState
from policy.webhooks import ENDED_EVENTS, GIVE_UP_AFTER_S, MAX_ENDPOINTS, SECRET_GRACE_S
from tasks.deliver import ATTEMPT_S, message
from tests.app.problem import assert_problem
from tests.builders import until
from tests.receivers import a_receiver


@pytest.fixture
def receiver():
    with a_receiver() as receiver:
        yield receiver


@pytest.fixture
def tenant(new_tenant):
    return new_tenant()


def subscribe(tenant, receiver, **fields) -> dict:
    answer = tenant.post("/v1/webhooks", json={"url": receiver.url, **fields})
    assert answer.status_code == 201, answer.text
    return answer.json()


def render(tenant, **fields) -> dict:
    body = {"prompt": "a red circle", "tier": "fast", "steps": 1, **fields}
    return tenant.post("/v1/jobs", json=body, headers={"Prefer": "wait=60"}).json()


def cancel(tenant) -> dict:
    job = tenant.post(
        "/v1/jobs",
        json={"prompt": "a red circle", "tier": "batch", "steps": 60, "metadata": {"order": "7"}},
    ).json()
    return tenant.post(job["urls"]["cancel"]).json()


def deliveries(tenant, endpoint, **query) -> list[dict]:
    return tenant.get(f"/v1/webhooks/{endpoint['id']}/deliveries", params=query).json()["data"]


def make_due(database, endpoint) -> None:
    """Let the time of the back-off have passed."""
    with transaction(database) as session:
        query = (
            "UPDATE webhook_deliveries SET due_at = clock_timestamp() WHERE endpoint_id = :id "
            "AND state = 'pending'"
        )
        session.execute(text(query), {"id": endpoint["id"]})


def test_an_endpoint_is_made_with_a_secret_that_is_shown_once(tenant, receiver):
    made = subscribe(tenant, receiver, description="orders")

    assert made["secret"].startswith("whsec_")
    assert len(base64.b64decode(made["secret"].removeprefix("whsec_"))) == 32
    assert (made["url"], made["events"], made["description"], made["disabled_at"]) == (
        receiver.url,
        list(ENDED_EVENTS),
        "orders",
        None,
    )
    shown = tenant.get(made["urls"]["self"]).json()
    assert shown == {key: value for key, value in made.items() if key != "secret"}
    assert tenant.get("/v1/webhooks").json()["data"] == [shown]


def test_a_finished_job_arrives_signed_and_without_its_prompt(tenant, receiver):
    endpoint = subscribe(tenant, receiver)

    job = render(tenant, seed=7, metadata={"order": "7"})

    until(lambda: receiver.heard)
    [heard] = receiver.heard
    message = Webhook(endpoint["secret"]).verify(heard.body, heard.headers)
    assert (message["type"], message["timestamp"]) == ("job.succeeded", job["finished_at"])
    data = message["data"]
    assert (data["id"], data["state"], data["seed"], data["metadata"]) == (
        job["id"],
        "succeeded",
        7,
        {"order": "7"},
    )
    assert data["images"][0]["pixels_sha256"] == job["images"][0]["pixels_sha256"]
    assert data["images"][0]["url"] == job["images"][0]["url"]
    assert b"red circle" not in heard.body
    until(lambda: deliveries(tenant, endpoint)[0]["state"] == "delivered")
    [delivery] = deliveries(tenant, endpoint)
    assert (delivery["id"], delivery["job_id"], delivery["event"]) == (
        heard.id,
        job["id"],
        "job.succeeded",
    )
    assert [(attempt["attempt"], attempt["status"]) for attempt in delivery["attempts"]] == [
        (1, 204)
    ]


def test_links_of_a_message_begin_with_the_public_address_where_there_is_one(
    stack_database, finished_job, api
):
    key = api.get("/v1/key").json()
    with transaction(stack_database) as session:
        job = jobs.find(
            session, uuid.UUID(finished_job["id"]), tenant_id=uuid.UUID(key["tenant_id"])
        )
    claim = SimpleNamespace(event="job.succeeded")

    data = message(claim, job, datetime.now(UTC), public_url="https://images.example/darkroom")[
        "data"
    ]

    assert data["urls"]["self"] == f"https://images.example/darkroom{finished_job['urls']['self']}"
    assert (
        data["images"][1]["url"]
        == f"https://images.example/darkroom{finished_job['images'][1]['url']}"
    )


def test_the_openai_client_verifies_it_too(tenant, receiver):
    endpoint = subscribe(tenant, receiver)
    cancel(tenant)
    until(lambda: receiver.heard)

    client = openai.OpenAI(api_key="none", webhook_secret=endpoint["secret"])
    client.webhooks.verify_signature(receiver.heard[0].body, receiver.heard[0].headers)

    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.verify_signature(receiver.heard[0].body + b" ", receiver.heard[0].headers)


def test_an_endpoint_that_names_no_events_hears_of_ends_and_of_nothing_else():
    ends = ["job.succeeded", "job.failed", "job.rejected", "job.canceled", "job.expired"]

    assert EndpointBody(url="https://example.com/").events == ends


def test_only_events_that_are_wanted_are_sent(tenant, receiver):
    endpoint = subscribe(tenant, receiver, events=["job.canceled"])

    render(tenant)
    cancel(tenant)

    until(lambda: receiver.heard)
    assert [heard.message["type"] for heard in receiver.heard] == ["job.canceled"]
    # written with the job's own end
    assert [delivery["event"] for delivery in deliveries(tenant, endpoint)] == ["job.canceled"]


def test_a_receiver_that_fails_is_tried_again_under_the_same_id_until_it_hears(
    tenant, receiver, stack_database
):
    endpoint = subscribe(tenant, receiver)
    receiver.status = 500

    cancel(tenant)
    until(lambda: receiver.heard and deliveries(tenant, endpoint)[0]["attempts"])
    [waiting] = deliveries(tenant, endpoint, state="pending")
    receiver.status = 204
    make_due(stack_database, endpoint)

    until(lambda: deliveries(tenant, endpoint)[0]["state"] == "delivered")
    [delivery] = deliveries(tenant, endpoint)
    assert [attempt["status"] for attempt in delivery["attempts"]] == [500, 204]
    assert deliveries(tenant, endpoint, state="pending") == []
    assert {heard.id for heard in receiver.heard} == {delivery["id"]}
    assert {heard.body for heard in receiver.heard} == {receiver.heard[0].body}
    assert waiting["due_at"] > waiting["attempts"][0]["at"]


def test_a_receiver_that_is_away_is_found_when_it_is_back(tenant, stack_database):
    with a_receiver() as receiver:
        endpoint = subscribe(tenant, receiver)
        port = receiver._server.server_port
    cancel(tenant)
    until(lambda: deliveries(tenant, endpoint)[0]["attempts"])
    [attempt] = deliveries(tenant, endpoint)[0]["attempts"]
    assert attempt["status"] is None
    assert attempt["error"]

    with a_receiver() as back:
        moved = tenant.patch(endpoint["urls"]["self"], json={"url": back.url})
        assert moved.status_code == 200
        make_due(stack_database, endpoint)
        until(lambda: back.heard)

    assert port
    until(lambda: deliveries(tenant, endpoint)[0]["state"] == "delivered")


def test_a_redirect_to_the_metadata_service_is_a_failure_and_is_not_followed(tenant, receiver):
    endpoint = subscribe(tenant, receiver)
    receiver.status, receiver.location = 302, "http://169.254.169.254/latest/meta-data/"

    cancel(tenant)

    until(lambda: deliveries(tenant, endpoint) and deliveries(tenant, endpoint)[0]["attempts"])
    [delivery] = deliveries(tenant, endpoint)
    assert (delivery["state"], delivery["attempts"][0]["status"]) == ("pending", 302)
    assert delivery["attempts"][0]["error"] == "redirects are not followed"


def test_a_receiver_that_says_gone_is_told_nothing_more(tenant, receiver):
    endpoint = subscribe(tenant, receiver)
    receiver.status = 410

    cancel(tenant)
    until(lambda: tenant.get(endpoint["urls"]["self"]).json()["disabled_at"])
    cancel(tenant)

    assert tenant.get(endpoint["urls"]["self"]).json()["disabled_reason"] == "gone"
    # a delivery is written with the job's own end: there is none that may still come
    assert [delivery["state"] for delivery in deliveries(tenant, endpoint)] == ["gone"]
    assert len(receiver.heard) == 1

    receiver.status = 204
    enabled = tenant.patch(endpoint["urls"]["self"], json={"enabled": True}).json()
    assert (enabled["disabled_at"], enabled["disabled_reason"]) == (None, None)
    cancel(tenant)
    until(lambda: len(receiver.heard) == 2)


HANG_S = 8  # less than an attempt may take
TRIES = 3  # a busy machine may need longer for one than a receiver hangs


def most_at_once(receiver, lasting_s: float) -> int:
    """How many attempts that last so long were under way together, at least."""
    times = [heard.at for heard in receiver.heard]
    return max(sum(0 <= time - begun < lasting_s for time in times) for begun in times)


def test_a_receiver_that_hangs_holds_up_neither_jobs_nor_other_receivers(new_tenant):
    def is_told_meanwhile() -> bool:
        """Whether another receiver is told of a job while the first attempts hang."""
        tenant, other = new_tenant(), new_tenant()
        with a_receiver() as hanging, a_receiver() as quick:
            subscribe(tenant, hanging)
            subscribe(other, quick)
            hanging.hang_s = HANG_S
            for _ in range(8):
                cancel(tenant)
            until(lambda: len(hanging.heard) >= 4)
            assert render(other)["state"] == "succeeded"
            until(lambda: quick.heard)
            assert most_at_once(hanging, HANG_S / 2) <= 4, "whatever waits"
            return quick.heard[0].at - hanging.heard[0].at < HANG_S

    assert any(is_told_meanwhile() for _ in range(TRIES))


def test_one_tenant_s_hanging_receivers_hold_up_nobody_else_s_webhooks(new_tenant):
    """Twenty endpoints that never answer, each with five events: they hold a few threads."""

    def are_told_meanwhile() -> bool:
        """Whether another tenant's receiver is told of two jobs while the first attempts hang."""
        tenant, other = new_tenant(), new_tenant()
        with a_receiver() as hanging, a_receiver() as quick:
            hanging.hang_s = 60
            endpoints = [subscribe(tenant, hanging) for _ in range(MAX_ENDPOINTS)]
            subscribe(other, quick)
            for _ in range(5):
                cancel(tenant)
            until(lambda: len(hanging.heard) >= AT_ONCE_PER_TENANT)
            for number in range(1, 3):
                cancel(other)
                until(lambda number=number: len(quick.heard) == number)
            assert most_at_once(hanging, ATTEMPT_S / 2) <= AT_ONCE_PER_TENANT
            for endpoint in endpoints:
                tenant.delete(endpoint["urls"]["self"])
            return quick.heard[-1].at - hanging.heard[0].at < ATTEMPT_S

    assert any(are_told_meanwhile() for _ in range(TRIES))


def test_a_rotated_secret_signs_beside_the_one_before_it(tenant, receiver):
    first = subscribe(tenant, receiver)["secret"]
    endpoint = tenant.get("/v1/webhooks").json()["data"][0]

    rotated = tenant.post(f"{endpoint['urls']['self']}/rotate").json()
    second = rotated["secret"]
    assert rotated["former_secret_signs_for_s"] == SECRET_GRACE_S
    cancel(tenant)
    until(lambda: receiver.heard)
    third = tenant.post(f"{endpoint['urls']['self']}/rotate").json()["secret"]
    cancel(tenant)
    until(lambda: len(receiver.heard) == 2)

    assert len({first, second, third}) == 3
    assert verifies(receiver.heard[0], first, second, third) == [True, True, False]
    assert verifies(receiver.heard[1], first, second, third) == [False, True, True]


def verifies(heard, *secrets) -> list[bool]:
    signed = f"{heard.id}.{heard.headers['webhook-timestamp']}.{heard.body.decode()}".encode()
    digests = [
        hmac.digest(base64.b64decode(secret.removeprefix("whsec_")), signed, hashlib.sha256)
        for secret in secrets
    ]
    return [
        f"v1,{base64.b64encode(digest).decode()}" in heard.headers["webhook-signature"].split(" ")
        for digest in digests
    ]


def test_a_delivery_can_be_sent_again_by_hand_under_its_id(tenant, receiver):
    endpoint = subscribe(tenant, receiver)
    cancel(tenant)
    until(
        lambda: (
            deliveries(tenant, endpoint) and deliveries(tenant, endpoint)[0]["state"] == "delivered"
        )
    )
    [delivery] = deliveries(tenant, endpoint)

    answer = tenant.post(f"/v1/webhooks/deliveries/{delivery['id']}/redeliver")

    assert answer.status_code == 202
    until(lambda: len(receiver.heard) == 2)
    assert {heard.id for heard in receiver.heard} == {delivery["id"]}
    until(lambda: len(deliveries(tenant, endpoint)[0]["attempts"]) == 2)


def test_a_test_event_can_be_asked_for(tenant, receiver):
    endpoint = subscribe(tenant, receiver)

    answer = tenant.post(f"/v1/webhooks/{endpoint['id']}/test")

    assert answer.status_code == 202
    until(lambda: receiver.heard)
    assert receiver.heard[0].message["type"] == "webhook.test"
    assert receiver.heard[0].id == answer.json()["id"]


def test_a_deleted_endpoint_is_gone_with_all_that_waited_for_it(tenant, receiver, stack_database):
    endpoint = subscribe(tenant, receiver)
    receiver.status = 500
    cancel(tenant)
    until(lambda: deliveries(tenant, endpoint) and deliveries(tenant, endpoint)[0]["attempts"])
    delivery = deliveries(tenant, endpoint)[0]["id"]

    assert tenant.delete(endpoint["urls"]["self"]).status_code == 204

    assert_problem(tenant.get(endpoint["urls"]["self"]), 404, "webhook-not-found")
    assert_problem(
        tenant.post(f"/v1/webhooks/deliveries/{delivery}/redeliver"), 404, "delivery-not-found"
    )
    with transaction(stack_database) as session:
        assert (
            session.scalar(
                text("SELECT state FROM webhook_deliveries WHERE id = :id"), {"id": delivery}
            )
            == "gone"
        )


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/url"),
        ({"url": "https://169.254.169.254/"}, "/url"),
        ({"url": "https://user:pass@example.com/"}, "/url"),
        ({"url": "https://example.com/", "events": []}, "/events"),
        ({"url": "https://example.com/", "events": ["job.started"]}, "/events"),
        ({"url": "https://example.com/", "events": "job.failed"}, "/events"),
        ({"url": "https://example.com/", "description": "x" * 257}, "/description"),
        ({"url": "https://example.com/", "secret": "mine"}, "/secret"),
    ],
)
def test_an_endpoint_that_cannot_be_used_is_refused_with_a_pointer(tenant, body, pointer):
    problem = assert_problem(tenant.post("/v1/webhooks", json=body), 422, "invalid-request")

    assert problem["errors"][0]["pointer"] == pointer
    assert tenant.get("/v1/webhooks").json()["data"] == []


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"url": "http://169.254.169.254/latest/meta-data/"}, "/url"),
        ({"url": "http://[fd00:ec2::254]/"}, "/url"),
        ({"url": "http://10.0.0.1/"}, "/url"),
        ({"url": "https://user:pass@example.com/"}, "/url"),
        ({"url": "ftp://example.com/"}, "/url"),
        ({"events": []}, "/events"),
        ({"events": ["job.started"]}, "/events"),
        ({"description": "x" * 257}, "/description"),
        ({"description": "a\x00b"}, "/description"),
        ({"secret": "mine"}, "/secret"),
    ],
)
def test_an_endpoint_cannot_be_changed_into_one_that_could_not_be_made(tenant, change, pointer):
    endpoint = tenant.post("/v1/webhooks", json={"url": "https://example.com/"}).json()
    before = tenant.get(endpoint["urls"]["self"]).json()

    answer = tenant.patch(endpoint["urls"]["self"], json={"enabled": False} | change)

    problem = assert_problem(answer, 422, "invalid-request")
    assert problem["errors"][0]["pointer"] == pointer
    assert tenant.get(endpoint["urls"]["self"]).json() == before


@pytest.mark.parametrize(
    "change",
    [
        {"url": "https://example.com/other"},
        {"events": ["job.failed"]},
        {"description": "orders"},
        {"description": ""},
        {"url": "https://example.com/2", "events": ["job.expired"], "description": "all"},
        {},
    ],
)
def test_an_endpoint_changes_in_what_is_named_and_in_nothing_else(tenant, change):
    body = {"url": "https://example.com/", "description": "first", "events": ["job.canceled"]}
    own = tenant.post("/v1/webhooks", json=body).json()["urls"]["self"]
    before = tenant.get(own).json()

    changed = tenant.patch(own, json=change).json()

    assert changed == before | change
    assert tenant.get(own).json() == changed


def test_an_endpoint_is_disabled_and_enabled_by_hand(tenant):
    made = tenant.post("/v1/webhooks", json={"url": "https://example.com/"}).json()
    own = made["urls"]["self"]
    before = tenant.get(own).json()

    disabled = tenant.patch(own, json={"enabled": False}).json()
    enabled = tenant.patch(own, json={"enabled": True}).json()

    changed = {name for name in before if disabled[name] != before[name]}
    assert changed == {"disabled_at", "disabled_reason"}
    assert enabled == before


def test_a_delivery_is_given_up_three_days_after_its_event(tenant, receiver, stack_database):
    endpoint = subscribe(tenant, receiver)
    receiver.status = 500
    cancel(tenant)
    until(lambda: receiver.heard and deliveries(tenant, endpoint)[0]["attempts"])
    assert deliveries(tenant, endpoint)[0]["due_at"] is not None

    age(stack_database, endpoint, GIVE_UP_AFTER_S)

    until(lambda: deliveries(tenant, endpoint)[0]["state"] == "failed")
    [delivery] = deliveries(tenant, endpoint)
    assert (delivery["due_at"], delivery["ended_at"] is None) == (None, False)
    assert [attempt["status"] for attempt in delivery["attempts"]] == [500, 500]


def age(database, endpoint, seconds) -> None:
    """Let the endpoint's deliveries have waited so long, and be due."""
    with transaction(database) as session:
        query = """UPDATE webhook_deliveries
                   SET created_at = created_at - make_interval(secs => :s),
                   due_at = clock_timestamp() WHERE endpoint_id = :id AND state = 'pending'"""
        session.execute(text(query), {"id": endpoint["id"], "s": seconds})


def test_a_tenant_has_so_many_endpoints_and_no_more(tenant):
    for number in range(MAX_ENDPOINTS):
        assert (
            tenant.post("/v1/webhooks", json={"url": f"https://example.com/{number}"}).status_code
            == 201
        )

    assert_problem(
        tenant.post("/v1/webhooks", json={"url": "https://example.com/"}), 422, "invalid-request"
    )


def test_another_tenant_s_endpoints_are_not_there(tenant, stranger, receiver):
    endpoint = subscribe(tenant, receiver)
    own = endpoint["urls"]["self"]

    for method, path in (
        ("GET", own),
        ("PATCH", own),
        ("DELETE", own),
        ("POST", f"{own}/rotate"),
        ("POST", f"{own}/test"),
    ):
        answer = stranger.request(method, path, json={} if method == "PATCH" else None)
        assert_problem(answer, 404, "webhook-not-found")
    assert_problem(stranger.get(f"{own}/deliveries"), 404, "webhook-not-found")
    assert_problem(
        stranger.post(f"/v1/webhooks/deliveries/{uuid.uuid4()}/redeliver"),
        404,
        "delivery-not-found",
    )


def test_deliveries_come_in_pages(tenant, receiver):
    endpoint = subscribe(tenant, receiver)
    for _ in range(3):
        cancel(tenant)

    first = tenant.get(f"/v1/webhooks/{endpoint['id']}/deliveries", params={"limit": 2})
    second = tenant.get(first.headers["Link"].partition("<")[2].partition(">")[0])

    assert first.json()["has_more"]
    assert [len(answer.json()["data"]) for answer in (first, second)] == [2, 1]
    assert_problem(
        tenant.get(f"/v1/webhooks/{endpoint['id']}/deliveries", params={"state": "lost"}),
        422,
        "invalid-query",
    )


def test_deliveries_can_be_listed_by_their_state(tenant, receiver):
    endpoint = subscribe(tenant, receiver)
    for _ in range(2):
        cancel(tenant)
    until(lambda: [each["state"] for each in deliveries(tenant, endpoint)] == ["delivered"] * 2)

    counts = {state: len(deliveries(tenant, endpoint, state=state)) for state in DeliveryState}
    first = tenant.get(
        f"{endpoint['urls']['self']}/deliveries", params={"limit": 1, "state": "delivered"}
    )

    assert counts == dict.fromkeys(DeliveryState, 0) | {"delivered": 2}
    assert len(tenant.get(first.links["next"]["url"]).json()["data"]) == 1
    assert "state=delivered" in first.links["next"]["url"]
