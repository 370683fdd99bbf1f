"""Define problems: the members of RFC 9457, OpenAI's `error` object, and the extra members."""

from typing import Annotated, Any, NotRequired

from pydantic import with_config
from typing_extensions import TypedDict

from app.schemas.base import described, says


@with_config(described("One wrong field of a request."))
class FieldError(TypedDict):
    pointer: Annotated[str, says("A JSON pointer to the field.", examples=["/steps"])]
    detail: Annotated[str, says("What is wrong with it.")]
    accepted: NotRequired[Annotated[Any, says("What would be accepted.")]]


class ProblemFacts(TypedDict, total=False):
    """The members that only some types of problems have."""

    errors: Annotated[list[FieldError], says("The wrong fields.")]
    errors_left_out: Annotated[int, says("How many more wrong fields there are.")]
    accepted: Annotated[Any, says("What would be accepted.")]
    parameter: Annotated[str, says("The query parameter, or field, that it is about.")]
    header: Annotated[str, says("The header that it is about.")]
    reason: Annotated[str, says("Why the job cannot be served now.")]
    state: Annotated[str, says("The state of the job.")]
    failure_code: Annotated[str, says("Why the job failed.")]
    job_id: Annotated[str, says("The job that it is about.")]
    gone: Annotated[str, says("What the job would need and is not there any more.")]
    part: Annotated[str, says("The part of the installation that cannot be reached.")]
    policy: Annotated[str, says("The limit, as `RateLimit-Policy` names it.")]
    period: Annotated[str, says("What the quota is for: a day or a month.")]
    quota: Annotated[float, says("How much it allows.")]
    window_s: Annotated[int, says("In so many seconds.")]
    max_concurrent_jobs: Annotated[int, says("How many jobs may be under way.")]
    max_stored_bytes: Annotated[int, says("How many bytes of pictures may be stored.")]
    stored_bytes: Annotated[int, says("How many would be stored with this picture.")]
    size_bytes: Annotated[int, says("The size of the picture.")]
    scope: Annotated[str, says("The scope that the key would need.")]
    scopes: Annotated[list[str], says("The scopes that it has.")]


@with_config(described("A refusal as a part of another answer."))
class ProblemSummary(ProblemFacts):
    type: Annotated[str, says("GET it to read what it means.", examples=["/problems/not-found"])]
    title: Annotated[str, says("The type in a few words.")]
    status: Annotated[int, says("The status of the answer.")]
    detail: Annotated[str, says("What happened this time.")]


@with_config(described("Why a job would be refused now."))
class Refusal(ProblemSummary):
    retry_after_s: Annotated[int | None, says("When asking again may help.")]


@with_config(described("Why an item of a batch was refused."))
class RefusedItem(ProblemSummary):
    retry_after_s: NotRequired[Annotated[int, says("When asking again may help.")]]


@with_config(described("The same problem in OpenAI's words."))
class OpenAIError(TypedDict):
    message: Annotated[str, says("What happened, with the wrong fields.")]
    type: Annotated[str, says("Its kind.", examples=["invalid_request_error"])]
    param: Annotated[str | None, says("The first field that it is about.")]
    code: Annotated[str, says("The last part of the problem's `type`.")]


@with_config(described("Why a request was refused or failed (RFC 9457)."))
class Problem(ProblemSummary):
    instance: Annotated[str, says("Names the request: quote it when you report a fault.")]
    error: OpenAIError


@with_config(described("What a type of problem means."))
class ProblemType(TypedDict):
    type: Annotated[str, says("What problems of the type say.")]
    title: Annotated[str, says("The type in a few words.")]
    status: Annotated[int, says("The status of the answer.")]
    about: Annotated[str, says("What it means, and what helps.")]
