"""Problems as values: what points at a field, and what OpenAI's clients are told."""

import pytest

from app import problems
from app.problems import InvalidImageRequest, Problem


def test_a_problem_at_a_field_points_at_it_and_names_it():
    problem = InvalidImageRequest.at("adapters/0/strength", "must be a number")

    assert problem.detail == "adapters/0/strength must be a number."
    errors = [{"pointer": "/adapters/0/strength", "detail": "must be a number"}]
    assert problem.summary()["errors"] == errors
    assert problem.openai_error()["param"] == "adapters.0.strength"


@pytest.mark.parametrize("accepted", [[], {"min": 1}, "an https URL", False])
def test_a_problem_at_a_field_says_what_would_do(accepted):
    [error] = InvalidImageRequest.at("steps", "is none", accepted=accepted).summary()["errors"]

    assert error["accepted"] == accepted


def test_a_problem_at_a_field_may_have_a_sentence_of_its_own():
    problem = InvalidImageRequest.at("", "has too much", sentence="The body has too much.")

    assert (problem.detail, problem.summary()["errors"][0]["pointer"]) == (
        "The body has too much.",
        "/",
    )


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("Unauthenticated", "authentication_error"),
        ("Forbidden", "permission_error"),
        ("RateLimited", "rate_limit_error"),
        ("QuotaExceeded", "insufficient_quota"),
        ("StorageQuotaExceeded", "insufficient_quota"),
        ("ModerationBlocked", "image_generation_user_error"),
        ("JobNotFound", "invalid_request_error"),
        ("InvalidImageRequest", "invalid_request_error"),
        ("Unexpected", "server_error"),
        ("PartUnavailable", "server_error"),
    ],
)
def test_openai_s_clients_are_told_what_kind_of_error_it_is(kind, told):
    problem: Problem = getattr(problems, kind)("For once.")

    assert problem.openai_error() == {
        "message": "For once.",
        "type": told,
        "param": None,
        "code": problem.slug.replace("-", "_"),
    }
