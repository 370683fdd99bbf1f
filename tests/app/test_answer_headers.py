"""What every answer says about itself: its kind, how long it may be kept, whether to ask again."""

import uuid

import pytest
from flask import Flask

from app import problems
from app.problems import Problem

# Public: clients tell problems apart by these. Another status or name breaks them.
STATUS_OF = {
    "malformed-body": 400,
    "moderation-blocked": 400,
    "not-offered": 400,
    "unauthenticated": 401,
    "forbidden": 403,
    "link-expired": 403,
    "not-found": 404,
    "job-not-found": 404,
    "image-not-found": 404,
    "file-not-found": 404,
    "webhook-not-found": 404,
    "delivery-not-found": 404,
    "tenant-not-found": 404,
    "key-not-found": 404,
    "model-not-found": 404,
    "method-not-allowed": 405,
    "request-timeout": 408,
    "image-not-ready": 409,
    "job-already-finished": 409,
    "replay-impossible": 409,
    "file-in-use": 409,
    "tenant-exists": 409,
    "storage-quota-exceeded": 409,
    "erased": 410,
    "body-too-large": 413,
    "unsupported-media-type": 415,
    "range-not-satisfiable": 416,
    "invalid-image-request": 422,
    "invalid-request": 422,
    "invalid-picture": 422,
    "invalid-query": 422,
    "idempotency-key-reused": 422,
    "rate-limited": 429,
    "budget-spent": 429,
    "too-many-jobs": 429,
    "quota-exceeded": 429,
    "tenant-queue-full": 429,
    "unexpected": 500,
    "job-failed": 500,
    "method-unknown": 501,
    "streams-exhausted": 503,
    "waits-exhausted": 503,
    "uploads-exhausted": 503,
    "fleet-saturated": 503,
    "model-unserved": 503,
    "job-expired": 503,
    "part-unavailable": 503,
    "job-unfinished": 504,
}


def problem_kinds(kind: type[Problem] = Problem) -> list[type[Problem]]:
    return [kind, *(below for child in kind.__subclasses__() for below in problem_kinds(child))]


def test_problem_types_and_statuses_stay_as_clients_know_them():
    assert {kind.slug: kind.status for kind in problem_kinds()} == STATUS_OF


@pytest.mark.parametrize("kind", problem_kinds(), ids=lambda kind: f"{kind.status}-{kind.slug}")
def test_a_problem_says_when_to_ask_again_or_that_it_would_not_help(kind):
    members = {"size_bytes": 7} if kind.status == 416 else {}

    with Flask("here").test_request_context():
        for_good = kind("No.", **members).headers()
        for_now = kind("Not now.", retry_after_s=3, **members).headers()

    # OpenAI's clients try 409 and 429 again by themselves, unless they are told not to.
    assert for_good.get("X-Should-Retry") == ("false" if kind.status in (409, 429) else None)
    assert "Retry-After" not in for_good
    assert (for_now["Retry-After"], "X-Should-Retry" in for_now) == ("3", False)
    assert {for_good["Cache-Control"], for_now["Cache-Control"]} == {"no-store"}


def test_a_refusal_for_good_reaches_clients_with_the_word_not_to_retry(api, finished_job):
    refused = api.post(finished_job["urls"]["cancel"])

    assert (refused.status_code, refused.headers["X-Should-Retry"]) == (409, "false")


@pytest.mark.parametrize(
    ("path", "cache_control"),
    [
        ("{job}", "private, no-cache"),
        ("{job}/status", "private, max-age=1"),
        ("{job}/images/0", "no-store"),  # a redirect to a URL that expires
        ("{job}/images/0?redirect=false", "private, max-age=600"),
        ("/openapi.json", "private, max-age=60"),  # of this key
        ("/v1/jobs/{nobody}", "no-store"),
        ("/v1/jobs", None),
        ("/healthz", None),
        ("/nowhere", "no-store"),
    ],
)
def test_answers_say_their_kind_and_how_long_they_keep(api, finished_job, path, cache_control):
    answer = api.get(path.format(job=finished_job["urls"]["self"], nobody=uuid.uuid4()))

    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers.get("Cache-Control") == cache_control
    assert answer.headers["X-Request-Id"]


def test_answers_to_nobody_and_to_wrong_methods_say_their_kind_too(nobody):
    answers = [nobody.request(method, "/v1/jobs") for method in ("GET", "DELETE", "BREW")]

    assert [answer.status_code for answer in answers] == [401, 405, 501]
    assert {answer.headers["X-Content-Type-Options"] for answer in answers} == {"nosniff"}


def test_problems_are_all_drawn_at_the_top_of_their_file():
    drawn = problems.__doc__ or ""

    assert [kind.__name__ for kind in problem_kinds()[1:] if kind.__name__ not in drawn] == []
