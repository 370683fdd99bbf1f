"""Define problems: the members of RFC 9457, OpenAI's `error` object, and the extra members."""

from typing import Annotated, Any, NotRequired

from pydantic import with_config
from typing_extensions import TypedDict

from app.schemas.base import described, says


@with_config(described("One wrong field of a request."))
class FieldError(TypedDict):
    pointer: Annotated[str, says("The field, as a JSON pointer.", examples=["/steps"])]
    detail: Annotated[str, says("What is wrong with the field.")]
    accepted: NotRequired[Annotated[Any, says("The values that would be accepted.")]]


class ProblemFacts(TypedDict, total=False):
    """The members that only some types of problems have."""

    errors: Annotated[list[FieldError], says("The wrong fields.")]
    errors_left_out: Annotated[int, says("The number of wrong fields that are not listed.")]
    accepted: Annotated[Any, says("The values that would be accepted.")]
    parameter: Annotated[str, says("The query parameter or field that is wrong.")]
    header: Annotated[str, says("The header that is wrong.")]
    reason: Annotated[str, says("Why the job cannot be served now.")]
    state: Annotated[str, says("The state of the job.")]
    failure_code: Annotated[str, says("Why the job failed.")]
    job_id: Annotated[str, says("The id of the job.")]
    gone: Annotated[str, says("What the job needs and does not exist any more.")]
    part: Annotated[str, says("The part of the installation that cannot be reached.")]
    policy: Annotated[str, says("The limit, as `RateLimit-Policy` names it.")]
    period: Annotated[str, says("The period of the quota: a day or a month.")]
    quota: Annotated[float, says("The quota or limit, in its unit.")]
    window_s: Annotated[int, says("The period of the limit, in seconds.")]
    max_concurrent_jobs: Annotated[int, says("The most jobs that may be unfinished at once.")]
    max_stored_bytes: Annotated[int, says("The most bytes of pictures that may be stored.")]
    stored_bytes: Annotated[int, says("The bytes that would be stored with this picture.")]
    size_bytes: Annotated[int, says("The size of the picture.")]
    scope: Annotated[str, says("The scope that the request needs.")]
    scopes: Annotated[list[str], says("The scopes that the key has.")]


@with_config(described("A problem as a part of another answer."))
class ProblemSummary(ProblemFacts):
    type: Annotated[
        str,
        says(
            "The type of problem; GET it to read what it means.", examples=["/problems/not-found"]
        ),
    ]
    title: Annotated[str, says("The type of problem in a few words.")]
    status: Annotated[int, says("The status of the answer.")]
    detail: Annotated[str, says("What went wrong in this case.")]


@with_config(described("Why a job would be refused now."))
class Refusal(ProblemSummary):
    retry_after_s: Annotated[int | None, says("Seconds after which trying again may help.")]


@with_config(described("Why an item of a batch was refused."))
class RefusedItem(ProblemSummary):
    retry_after_s: NotRequired[Annotated[int, says("Seconds after which trying again may help.")]]


@with_config(described("The same problem in the format of OpenAI."))
class OpenAIError(TypedDict):
    message: Annotated[str, says("What went wrong, with the wrong fields.")]
    type: Annotated[str, says("The kind of error.", examples=["invalid_request_error"])]
    param: Annotated[str | None, says("The first field that is wrong, if any.")]
    code: Annotated[str, says("The last part of the problem's `type`.")]


@with_config(described("Why a request was refused or failed (RFC 9457)."))
class Problem(ProblemSummary):
    instance: Annotated[str, says("The id of the request: quote it when you report a fault.")]
    error: OpenAIError


@with_config(described("What a type of problem means."))
class ProblemType(TypedDict):
    type: Annotated[str, says("The `type` of the problem.")]
    title: Annotated[str, says("The type of problem in a few words.")]
    status: Annotated[int, says("The status of the answer.")]
    about: Annotated[str, says("What the problem means, and what to do about it.")]
