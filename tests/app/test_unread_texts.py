"""What of a job's texts the model does not read is told.

In the job, to OpenAI's clients and in the audit log.
"""

import openai
import pytest
from sqlalchemy import text

from models.database import transaction
from tests.app.conftest import bearer

KNOWN = "a large red circle in the center on a blue background"
LONG = KNOWN + ", very detailed picture" * 20
JOB_BODY = {"seed": 11, "steps": 2}
ROOM = 22  # tokens that the pocket model's encoder has for a text
WAIT = {"Prefer": "wait=60"}


def render(api, **job_body) -> dict:
    job = api.post("/v1/jobs", json={**JOB_BODY, **job_body}, headers=WAIT).json()
    assert job["state"] == "succeeded", job
    return job


@pytest.fixture
def client(stack, api) -> openai.OpenAI:
    key = api.headers["Authorization"].partition(" ")[2]
    return openai.OpenAI(
        base_url=f"{stack.env['DARKROOM_URL']}/v1", api_key=key, max_retries=0, timeout=120
    )


def test_a_prompt_that_is_cut_off_is_told_and_its_end_has_no_effect(api):
    one, other = render(api, prompt=f"{LONG}, a star"), render(api, prompt=f"{LONG}, a square")

    for job in (one, other):
        [warning] = job["warnings"]
        assert (warning["code"], warning["field"], warning["tokens_read"]) == (
            "prompt_truncated",
            "prompt",
            ROOM,
        )
        assert warning["tokens_given"] > ROOM
        assert f"the model reads the first {ROOM}, and the rest has no effect" in warning["detail"]
        assert api.get(job["urls"]["status"]).json()["warnings"] == job["warnings"]
    assert one["images"][0]["pixels_sha256"] == other["images"][0]["pixels_sha256"]


def test_nothing_is_told_of_a_prompt_that_is_read(api):
    assert render(api, prompt=KNOWN, negative_prompt="a green star", guidance=2.0)["warnings"] == []


def test_a_job_tells_the_tokens_of_its_prompt_once_it_is_rendered(api):
    waiting = api.post("/v1/jobs", json={**JOB_BODY, "prompt": LONG, "tier": "batch"}).json()
    short, long = render(api, prompt=KNOWN), render(api, prompt=LONG)

    [warning] = long["warnings"]
    unread = warning["tokens_given"] - warning["tokens_read"]
    assert (waiting["prompt_tokens"], waiting["truncated_tokens"]) == (None, None)
    assert 0 < short["prompt_tokens"] <= ROOM
    assert short["truncated_tokens"] == 0
    assert (long["prompt_tokens"], long["truncated_tokens"]) == (warning["tokens_given"], unread)


def test_a_negative_prompt_without_guidance_is_told_at_once_and_once(api):
    job_body = {**JOB_BODY, "prompt": KNOWN, "negative_prompt": "a green star", "guidance": 1.0}

    estimate = api.post("/v1/estimate", json=job_body).json()
    accepted = api.post("/v1/jobs", json=job_body).json()
    ended = api.get(accepted["urls"]["self"], headers=WAIT).json()

    [warning] = accepted["warnings"]
    assert (warning["code"], warning["field"]) == ("negative_prompt_ignored", "negative_prompt")
    assert "it needs guidance above 1" in warning["detail"]
    assert estimate["warnings"] == ended["warnings"] == accepted["warnings"]


def test_the_audit_log_says_how_much_was_read(api, stack_database):
    job = render(api, prompt=LONG, n=2)

    with transaction(stack_database) as session:
        query = "SELECT facts FROM audit_log WHERE job_id = :id AND event = 'job:text:left-unread'"
        [facts] = session.scalars(text(query), {"id": job["id"]})
    [warning] = job["warnings"]
    assert facts == {
        name: warning[name] for name in ("code", "field", "tokens_given", "tokens_read")
    }


def test_openai_s_clients_are_told(client):
    answer = client.images.generate(prompt=LONG, extra_body=JOB_BODY)
    events = list(client.images.generate(prompt=LONG, stream=True, extra_body=JOB_BODY))

    assert answer.warnings[0]["code"] == "prompt_truncated"
    assert answer.usage.input_tokens == answer.warnings[0]["tokens_given"]
    assert events[-1].warnings == answer.warnings


def test_followers_are_told_with_the_end(api):
    job = api.post("/v1/jobs", json={**JOB_BODY, "prompt": LONG}).json()

    with api.stream(
        "GET", job["urls"]["events"], headers=bearer(api.headers["Authorization"].partition(" ")[2])
    ) as answer:
        said = "".join(answer.iter_text())

    assert '"code": "prompt_truncated"' in said.rpartition("event: final")[2]
