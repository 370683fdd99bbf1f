"""What every refusal of the API has in common."""

from typing import Any


def assert_problem(answer: Any, status: int, slug: str) -> dict[str, Any]:
    """The members of a problem that is whole (RFC 9457) and can be found in the logs by its request
    id.
    """
    body = answer.json() if callable(answer.json) else answer.json
    assert (answer.status_code, body.get("type")) == (status, f"/problems/{slug}"), body
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    assert body["instance"] == f"/requests/{answer.headers['X-Request-Id']}"
    assert answer.headers["Cache-Control"] == "no-store"
    return body
