"""Read the API's answers: HTTP responses become typed values or the errors of errors.py. No I/O."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from darkroom_client.documents import Estimate, File, Status, Submission, Usage
from darkroom_client.errors import FieldError, ProblemError, UnexpectedAnswer
from darkroom_client.jobs import (
    Failure,
    Job,
    Progress,
    Queue,
    cost_of,
    parameters_of,
    part_of,
    plain_of,
    warnings_of,
)
from darkroom_client.retries import retry_after_s

Read = TypeVar("Read")


@dataclass(frozen=True)
class Page:
    """One page of a list. next_cursor: None on the last."""

    jobs: tuple[Job, ...]
    next_cursor: str | None


def read_job(answer: httpx.Response) -> Job:
    return _read(answer, "job", Job.from_json)


def read_page(answer: httpx.Response) -> Page:
    def page(members: dict[str, Any]) -> Page:
        jobs = tuple(Job.from_json(job) for job in members["data"])
        return Page(jobs, members["next_cursor"] if members["has_more"] else None)

    return _read(answer, "list of jobs", page)


def read_submissions(answer: httpx.Response) -> tuple[Submission, ...]:
    """Return one Submission for each job of a batch, in their order. Raises as `read_object`."""

    def submission(item: dict[str, Any]) -> Submission:
        job = item.get("job")
        refusal = item.get("problem")
        return Submission(
            job_id=job["id"] if job else None, problem=_refusal(refusal), members=item
        )

    return _read(
        answer, "batch", lambda members: tuple(submission(item) for item in members["data"])
    )


def read_estimate(answer: httpx.Response) -> Estimate:
    def estimate(members: dict[str, Any]) -> Estimate:
        return Estimate(
            **plain_of(Estimate, members),
            **parameters_of(members),
            refusal=_refusal(members.get("refusal")),
            cost=cost_of(members.get("cost")),
            queue=part_of(Queue, members.get("queue")),
            warnings=warnings_of(members),
            members=members,
        )

    return _read(answer, "estimate", estimate)


def read_status(answer: httpx.Response) -> Status:
    def status(members: dict[str, Any]) -> Status:
        return Status(
            id=members["id"],
            state=members["state"],
            attempt=members.get("attempt"),
            progress=part_of(Progress, members.get("progress")),
            queue=part_of(Queue, members.get("queue")),
            failure=part_of(Failure, members.get("failure")),
            members=members,
        )

    return _read(answer, "status", status)


def read_file(answer: httpx.Response) -> File:
    def file(members: dict[str, Any]) -> File:
        return File(
            id=members["id"],
            width_px=members.get("width_px"),
            height_px=members.get("height_px"),
            members=members,
        )

    return _read(answer, "file", file)


def read_usage(answer: httpx.Response) -> Usage:
    return Usage(members=read_object(answer))


def read_nothing(answer: httpx.Response) -> None:
    """Check that the request succeeded; its answer has no content. Raises as `read_object`."""
    if not answer.is_success:
        read_object(answer)


def read_location(answer: httpx.Response) -> str:
    """Return the URL that a redirect points to. Raises as `read_object`."""
    if answer.is_redirect:
        return str(answer.headers["Location"])
    read_object(answer)
    raise UnexpectedAnswer(
        f"{answer.request.url} answered {answer.status_code} instead of a redirect"
    )


def read_object(answer: httpx.Response) -> dict[str, Any]:
    """Return the JSON object of a successful answer.

    Raises ProblemError for a refusal and UnexpectedAnswer for anything else. Every reader in this
    module does the same.
    """
    answered = f"{answer.request.url} answered {answer.status_code}"
    try:
        members = answer.json()
    except ValueError:
        members = None
    if not isinstance(members, dict):
        raise UnexpectedAnswer(f"{answered} with something that is not a JSON object")
    if answer.is_success:
        return members
    if "title" not in members:
        raise UnexpectedAnswer(f"{answered} without saying why")
    raise problem_of(members, answer.status_code, retry_after_s=retry_after_s(answer))


def problem_of(
    members: dict[str, Any], status: int, *, retry_after_s: float | None
) -> ProblemError:
    """Make the error that a problem document describes."""
    errors = members.get("errors") or ()
    return ProblemError(
        status=status,
        retry_after_s=retry_after_s,
        type=str(members.get("type", "about:blank")),
        title=str(members["title"]),
        detail=str(members.get("detail") or ""),
        errors=tuple(
            FieldError(
                str(error.get("pointer", "")), str(error.get("detail", "")), error.get("accepted")
            )
            for error in errors
        ),
        request_id=members.get("instance"),
        members=members,
    )


def _refusal(members: dict[str, Any] | None) -> ProblemError | None:
    """Make the error of a problem that is part of an answer; None where there is none."""
    if members is None:
        return None
    return problem_of(
        members, int(members.get("status", 0)), retry_after_s=members.get("retry_after_s")
    )


def _read(answer: httpx.Response, what: str, read: Callable[[dict[str, Any]], Read]) -> Read:
    members = read_object(answer)
    try:
        return read(members)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnexpectedAnswer(
            f"{answer.request.url} answered with something that is not a valid {what} ({error!r})"
        ) from error
