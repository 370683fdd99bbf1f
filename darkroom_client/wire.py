"""The API as it looks on the wire: requests as values, answers read. No I/O, so that a client of any colour can use it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from darkroom_client.errors import FieldError, ProblemError, UnexpectedAnswer
from darkroom_client.jobs import Job

_ANSWER_IN_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request: what httpx.Client.request and httpx.AsyncClient.request take."""

    method: str
    path: str
    params: Mapping[str, Any] = field(default_factory=dict)
    json: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = _ANSWER_IN_S

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for httpx."""
        body = {} if self.json is None else {"json": self.json}
        return {
            "method": self.method,
            "url": self.path,
            "params": dict(self.params),
            "headers": dict(self.headers),
            "timeout": self.timeout_s,
            **body,
        }


@dataclass(frozen=True)
class Page:
    """One page of a list. next_cursor: None on the last."""

    jobs: tuple[Job, ...]
    next_cursor: str | None


def create_job(wish: Mapping[str, Any]) -> Call:
    """What is None in `wish` is left for the gateway to resolve."""
    return Call(method="POST", path="/v1/jobs", json={name: value for name, value in wish.items() if value is not None})


def show_job(job_id: str, wait_s: int | None = None) -> Call:
    """wait_s: let the gateway hold the answer until the job is finished, at most so long (it allows 60)."""
    headers = {"Prefer": f"wait={wait_s}"} if wait_s else {}
    return Call(method="GET", path=f"/v1/jobs/{job_id}", headers=headers, timeout_s=_ANSWER_IN_S + (wait_s or 0))


def list_jobs(*, state: str | None, limit: int, cursor: str | None) -> Call:
    said = {"state": state, "limit": limit, "cursor": cursor}
    return Call(method="GET", path="/v1/jobs", params={name: value for name, value in said.items() if value is not None})


def cancel_job(job_id: str) -> Call:
    return Call(method="POST", path=f"/v1/jobs/{job_id}/cancel")


def show_image(job_id: str, index: int) -> Call:
    """Answered with a redirect to a presigned URL of the object store."""
    return Call(method="GET", path=f"/v1/jobs/{job_id}/images/{index}")


def list_of(resource: str) -> Call:
    """resource: models or tiers."""
    return Call(method="GET", path=f"/v1/{resource}")


def read_job(answer: httpx.Response) -> Job:
    """Raises ProblemError or UnexpectedAnswer."""
    members = read_object(answer)
    try:
        return Job.from_json(members)
    except (KeyError, TypeError, ValueError) as error:
        raise UnexpectedAnswer(f"{answer.request.url} answered with something that is no job ({error!r})") from error


def read_page(answer: httpx.Response) -> Page:
    """Raises ProblemError or UnexpectedAnswer."""
    members = read_object(answer)
    try:
        return Page(tuple(Job.from_json(job) for job in members["data"]), members["next_cursor"] if members["has_more"] else None)
    except (KeyError, TypeError, ValueError) as error:
        raise UnexpectedAnswer(f"{answer.request.url} answered with something that is no list of jobs ({error!r})") from error


def read_location(answer: httpx.Response) -> str:
    """Where a redirect points. Raises ProblemError or UnexpectedAnswer."""
    if answer.is_redirect:
        return str(answer.headers["Location"])
    read_object(answer)
    raise UnexpectedAnswer(f"{answer.request.url} answered {answer.status_code} instead of a redirect")


def read_object(answer: httpx.Response) -> dict[str, Any]:
    """The JSON object of a good answer; raises ProblemError for a refusal, UnexpectedAnswer for anything else."""
    try:
        members = answer.json()
    except ValueError:
        members = None
    if not isinstance(members, dict):
        raise UnexpectedAnswer(f"{answer.request.url} answered {answer.status_code} with something that is no JSON object")
    if answer.is_success:
        return members
    if "title" not in members:
        raise UnexpectedAnswer(f"{answer.request.url} answered {answer.status_code} without saying why")
    raise _problem(answer, members)


def _problem(answer: httpx.Response, members: Mapping[str, Any]) -> ProblemError:
    errors = members.get("errors") or ()
    retry_after = answer.headers.get("Retry-After", "")
    return ProblemError(
        status=answer.status_code,
        retry_after_s=float(retry_after) if retry_after.isdigit() else None,
        type=str(members.get("type", "about:blank")),
        title=str(members["title"]),
        detail=str(members.get("detail") or ""),
        errors=tuple(FieldError(str(error.get("pointer", "")), str(error.get("detail", "")), error.get("accepted")) for error in errors),
        request_id=members.get("instance"),
        members=members,
    )
