"""Describe the operations of jobs: accept, show, list, follow, cancel, replay, erase, estimate."""

from app.http.listing import METADATA
from app.schemas.bodies import BatchBody, JobBody
from app.schemas.events import STREAM as EVENTS
from app.schemas.jobs import Batch, Estimate, Job, JobPage, JobStatus
from app.spec.operation import (
    IDEMPOTENCY_KEY,
    IF_NONE_MATCH,
    JSON,
    LAST_EVENT_ID,
    PAGE,
    PICTURE_PARAMETERS,
    PREFER,
    PROMPT,
    Operation,
    Parameter,
    query,
)
from policy.states import JobState

_ONE_JOB = {"prompt": PROMPT, "tier": "batch", "steps": 4, "seed": 7, "metadata": {"order": "7"}}
_BATCH = {"jobs": [_ONE_JOB, {**_ONE_JOB, "seed": 8}]}
_UNCHANGED = "Nothing has changed since the answer with that `ETag`"
_METADATA = Parameter(
    name="metadata",
    where="query",
    about="`metadata.<key>=<value>`: only jobs with this metadata entry. With several, only jobs"
    " that have all of them.",
    schema={
        "type": "object",
        "patternProperties": {f"^{METADATA.replace('.', '[.]')}.+$": {"type": "string"}},
        "additionalProperties": False,
    },
    style={"style": "form", "explode": True},
)
_FILTERS = (
    query(
        "state", "Only jobs in this state.", type="string", enum=[state.value for state in JobState]
    ),
    query(
        "created_after",
        "Only jobs accepted at this instant or later.",
        type="string",
        format="date-time",
    ),
    query(
        "created_before",
        "Only jobs accepted before this instant.",
        type="string",
        format="date-time",
    ),
    _METADATA,
)

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/jobs"): Operation(
        summary="Create a job",
        description="Creates a job that makes images from a prompt. The answer comes at once, while"
        " the job waits for a worker. With `Prefer: wait=N` it comes when the job has ended, or"
        " after N seconds.",
        status=202,
        answers=(Job,),
        body={JSON: JobBody},
        examples={JSON: _ONE_JOB},
        parameters=(IDEMPOTENCY_KEY, PREFER),
    ),
    ("GET", "/v1/jobs"): Operation(
        summary="List jobs",
        description="Your jobs, newest first. With several filters, a page may have fewer jobs than"
        " `limit`, or none, although more follow: read on until `next_cursor` is null.",
        answers=(JobPage,),
        parameters=(*PAGE, *_FILTERS),
    ),
    ("GET", "/v1/jobs/{job_id}"): Operation(
        summary="Show a job",
        description="The job as it is now. With `Prefer: wait=N` the answer comes when the job"
        " has ended, or after N seconds.",
        answers=(Job,),
        also={304: _UNCHANGED},
        parameters=(IF_NONE_MATCH, PREFER),
    ),
    ("GET", "/v1/jobs/{job_id}/status"): Operation(
        summary="Show the status of a job",
        description="The members of a job that change until it ends, at most a second old. For"
        " polling: it costs less than the whole job, and with `If-None-Match` still less.",
        answers=(JobStatus,),
        also={304: _UNCHANGED},
        parameters=(IF_NONE_MATCH,),
    ),
    ("GET", "/v1/jobs/{job_id}/events"): Operation(
        summary="Follow a job live",
        description="The events of the job, as server-sent events: all of them, or those after"
        " `Last-Event-ID`. The last event is `final`; its data are the whole job.",
        events={name: (kind,) for name, kind in EVENTS.items()} | {"final": (Job,)},
        parameters=(
            query(
                "previews",
                "`true`: also send small previews of unfinished images.",
                type="string",
                enum=["true", "false"],
                default="false",
            ),
            LAST_EVENT_ID,
        ),
    ),
    ("POST", "/v1/jobs/{job_id}/cancel"): Operation(
        summary="Cancel a job",
        description="Cancels the job. To repeat this is harmless. 409 if the job has ended in"
        " another way.",
        answers=(Job,),
    ),
    ("POST", "/v1/jobs/{job_id}/replay"): Operation(
        summary="Replay a job",
        description="Creates a job with exactly the parameters of this one, including the version"
        " of its model. The request has no fields: send no body, or an empty object.",
        status=202,
        answers=(Job,),
        body={JSON: {"type": "object", "additionalProperties": False}},
        is_body_required=False,
        parameters=(IDEMPOTENCY_KEY, PREFER),
    ),
    ("DELETE", "/v1/jobs/{job_id}"): Operation(
        summary="Erase the content of a job",
        description="Deletes the prompts, metadata and images of the job, and cancels it if it"
        " has not ended. Its id, state, times and cost stay on record. To repeat this is"
        " harmless.",
        status=204,
    ),
    ("GET", "/v1/jobs/{job_id}/images/{index}"): Operation(
        summary="Download an image of a job",
        description="Redirects to the stored image, or answers with the image itself, as `redirect`"
        " or else the operator chooses. 409 while the image is not stored, 410 once the job was"
        " erased.",
        status=302,
        is_picture=True,
        parameters=PICTURE_PARAMETERS,
    ),
    ("POST", "/v1/jobs:batch"): Operation(
        summary="Create a batch of jobs",
        description="Accepts or refuses each item of the batch on its own. The answer lists, in the"
        " same order, the job of each accepted item and the problem of each refused one.",
        answers=(Batch,),
        body={JSON: BatchBody},
        examples={JSON: _BATCH},
        parameters=(IDEMPOTENCY_KEY,),
    ),
    ("POST", "/v1/estimate"): Operation(
        summary="Estimate a job",
        description="Shows the job that `POST /v1/jobs` would create from this body: every"
        " parameter, the expected price and the expected wait. Nothing is stored, not even a"
        " picture.",
        answers=(Estimate,),
        body={JSON: JobBody},
        examples={JSON: _ONE_JOB},
    ),
}
