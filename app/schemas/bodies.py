"""Bodies of requests that no model parses: what a batch holds."""

from typing import Annotated, Required

from pydantic import Field, with_config
from typing_extensions import TypedDict

from app.http.body import MAX_JOBS
from app.schemas.base import described, says


class JobFields(TypedDict):
    """Fields of a job, none of them required: in the document they are those of `JobBody`."""


@with_config(described("Jobs, each of which is accepted or refused by itself."))
class BatchBody(TypedDict, total=False):
    jobs: Required[
        Annotated[
            list[JobFields],
            Field(min_length=1, max_length=MAX_JOBS),
            says("What each job is to be."),
        ]
    ]
    defaults: Annotated[JobFields, says("Fields of every job that does not say them itself.")]
