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
_AS_BEFORE = "Nothing has changed"
_LABELS = Parameter(
    name="metadata",
    where="query",
    about="`metadata.<key>=<value>`: jobs that have this entry; with several, all of them.",
    schema={
        "type": "object",
        "patternProperties": {f"^{METADATA.replace('.', '[.]')}.+$": {"type": "string"}},
        "additionalProperties": False,
    },
    style={"style": "form", "explode": True},
)
_SOUGHT = (
    query("state", "Jobs in this state.", type="string", enum=[state.value for state in JobState]),
    query(
        "created_after",
        "Jobs accepted at this instant or later.",
        type="string",
        format="date-time",
    ),
    query(
        "created_before",
        "Jobs accepted before this instant.",
        type="string",
        format="date-time",
    ),
    _LABELS,
)

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/jobs"): Operation(
        summary="Accept a job",
        description="Makes images of a prompt. The answer comes at once, with the job that waits"
        " for a worker; with `Prefer: wait=N` it comes when the job has ended, or after N seconds.",
        status=202,
        answers=(Job,),
        body={JSON: JobBody},
        examples={JSON: _ONE_JOB},
        parameters=(IDEMPOTENCY_KEY, PREFER),
    ),
    ("GET", "/v1/jobs"): Operation(
        summary="List jobs",
        description="Your jobs, newest first. With several conditions a page may have fewer jobs"
        " than `limit`, or none, and go on at `next_cursor` all the same.",
        answers=(JobPage,),
        parameters=(*PAGE, *_SOUGHT),
    ),
    ("GET", "/v1/jobs/{job_id}"): Operation(
        summary="Show a job",
        description="The job as it is now; with `Prefer: wait=N`, at its end or after N seconds.",
        answers=(Job,),
        also={304: _AS_BEFORE},
        parameters=(IF_NONE_MATCH, PREFER),
    ),
    ("GET", "/v1/jobs/{job_id}/status"): Operation(
        summary="Show how a job stands",
        description="What changes of a job while one waits for it, as it was at most a second ago:"
        " cheap to ask for, and with `If-None-Match` cheaper.",
        answers=(JobStatus,),
        also={304: _AS_BEFORE},
        parameters=(IF_NONE_MATCH,),
    ),
    ("GET", "/v1/jobs/{job_id}/events"): Operation(
        summary="Follow a job live",
        description="What happens to the job, as server-sent events, from the first one or from"
        " `Last-Event-ID` on, until `final`, whose data are the whole job.",
        events={name: (kind,) for name, kind in EVENTS.items()} | {"final": (Job,)},
        parameters=(
            query(
                "previews",
                "`true`: with pictures on the way.",
                type="string",
                enum=["true", "false"],
                default="false",
            ),
            LAST_EVENT_ID,
        ),
    ),
    ("POST", "/v1/jobs/{job_id}/cancel"): Operation(
        summary="Cancel a job",
        description="Takes the job back. Harmless when repeated; 409 if it has ended otherwise.",
        answers=(Job,),
    ),
    ("POST", "/v1/jobs/{job_id}/replay"): Operation(
        summary="Replay a job",
        description="Accepts a job with every parameter of this one, the version of its model"
        " included. It takes no fields: send no body, or an empty object.",
        status=202,
        answers=(Job,),
        body={JSON: {"type": "object", "additionalProperties": False}},
        is_body_required=False,
        parameters=(IDEMPOTENCY_KEY, PREFER),
    ),
    ("DELETE", "/v1/jobs/{job_id}"): Operation(
        summary="Erase what a job was about",
        description="Deletes its prompts, metadata and images, and cancels it if it is under way."
        " That it was there, and what it cost, stays. Harmless when repeated.",
        status=204,
    ),
    ("GET", "/v1/jobs/{job_id}/images/{index}"): Operation(
        summary="Fetch an image of a job",
        description="A redirect to where the image is stored, or the image itself. 409 while it is"
        " not stored, 410 once the job was erased.",
        status=302,
        is_picture=True,
        parameters=PICTURE_PARAMETERS,
    ),
    ("POST", "/v1/jobs:batch"): Operation(
        summary="Accept a batch of jobs",
        description="Accepts every job of the batch that can be; the answer has, for each item and"
        " in the same order, its job or its problem.",
        answers=(Batch,),
        body={JSON: BatchBody},
        examples={JSON: _BATCH},
        parameters=(IDEMPOTENCY_KEY,),
    ),
    ("POST", "/v1/estimate"): Operation(
        summary="Estimate a job",
        description="Every parameter of the job that `POST /v1/jobs` would make of this body, its"
        " price and its wait. Nothing is written, not even a picture.",
        answers=(Estimate,),
        body={JSON: JobBody},
        examples={JSON: _ONE_JOB},
    ),
}
