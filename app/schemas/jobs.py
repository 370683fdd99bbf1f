"""Define documents of jobs: a job, its images, queue position, estimate; batches and pages."""

from typing import Annotated, Literal, NotRequired
from uuid import UUID

from pydantic import with_config
from typing_extensions import TypedDict

from app.schemas.base import (
    Instant,
    Link,
    Page,
    Sha256,
    Size,
    document,
    kept,
    one_of,
    says,
    with_params,
)
from app.schemas.problems import Refusal, RefusedItem
from policy.failures import FailureCode
from policy.formats import FORMATS
from policy.params import SHOWN
from policy.states import ImageState, JobState
from policy.warnings import IGNORED, TRUNCATED

State = Annotated[str, one_of(JobState)]
OutputFormat = Annotated[str, one_of(FORMATS)]


@with_config(kept("An adapter of the model, and how much of it."))
class Adapter(TypedDict):
    name: Annotated[str, says("One of the model's adapters.")]
    strength: Annotated[float, says("1 is all of it; below 0 it works the other way.")]


@with_config(kept("What was asked for and has no effect; the job is served all the same."))
class JobWarning(TypedDict):
    code: Annotated[str, one_of((TRUNCATED, IGNORED)), says("What it is.")]
    field: Annotated[str, says("The field of the request that it is about.")]
    detail: Annotated[str, says("The same for people.")]
    tokens_given: NotRequired[Annotated[int, says("How many tokens the text has.")]]
    tokens_read: NotRequired[Annotated[int, says("How many of them the model reads.")]]


@document("Every parameter of a job, resolved: enough to ask for the same images again.")
@with_params(SHOWN)
class Parameters:
    """The parameters that clients see, of a job and of an estimate.

    Listed here are those that JSON shows differently from the column of the same name.
    """

    size: Annotated[Size, says("Width and height in pixels.", examples=["128x128"])]
    prompt: Annotated[str | None, says("What the images show.")]
    negative_prompt: Annotated[str | None, says("What they do not show.")]
    seed: Annotated[int | None, says("The seed of image 0; image i has seed + i.")]
    output_format: Annotated[OutputFormat, says("The format of the images.")]
    adapters: Annotated[list[Adapter], says("Adapters of the model.")]
    determinism: Annotated[
        Literal["best_effort", "reproducible"],
        says("`reproducible`: the same parameters give the same pixels on hardware of one class."),
    ]


@document("Where an unfinished job stands.")
class QueuePlace:
    jobs_ahead: Annotated[int | None, says("Jobs of its tier before it; null once it runs.")]
    eta_p50_s: Annotated[float, says("Seconds until its images are stored: the median.")]
    eta_p90_s: Annotated[float, says("The same in nine cases of ten.")]


@document("Steps of all images of a job, added up.")
class Progress:
    step: Annotated[int, says("Steps that are done.")]
    num_steps: Annotated[int, says("Of so many.")]
    images_done: Annotated[int, says("Images that are stored.")]


@document("Why a job gave no images.")
class Failure:
    code: Annotated[str, says("What it was.", examples=[code.value for code in FailureCode])]
    detail: Annotated[str | None, says("More about it, where it is about the request.")]


@document("Seconds that a job took; null for what has not ended.")
class Timing:
    queue_s: Annotated[float | None, says("From its acceptance to its first start.")]
    render_s: Annotated[float | None, says("From there to its last pixels.")]
    store_s: Annotated[float | None, says("From there to its end.")]
    total_s: Annotated[float | None, says("From its acceptance to its end.")]


@document("What a job costs.")
class Cost:
    gpu_seconds: Annotated[float, says("Device seconds of its images.")]
    amount: Annotated[str, says("The price, as a decimal number.", examples=["0.000123"])]
    currency: Annotated[str, says("The currency of the price.")]


@document("One image of a job.")
class Image:
    index: Annotated[int, says("Its place in the job, from 0.")]
    seed: Annotated[int, says("The seed that it is made from.")]
    state: Annotated[Annotated[str, one_of(ImageState)], says("How it stands.")]
    url: Annotated[Link | None, says("Where it is found; null while, or once, it is not stored.")]
    pixels_sha256: Annotated[Sha256 | None, says("Of its RGB pixels: tells same images apart.")]
    content_sha256: Annotated[Sha256 | None, says("Of the file.")]
    content_type: Annotated[str | None, says("Of the file.")]
    size_bytes: Annotated[int | None, says("Of the file.")]
    width_px: Annotated[int | None, says("Its width.")]
    height_px: Annotated[int | None, says("Its height.")]


@document("Where a job is found, and what can be done with it.")
class JobUrls:
    self: Annotated[Link, says("GET shows the job, DELETE erases it.")]
    status: Annotated[Link, says("GET shows the little that changes.")]
    cancel: Annotated[Link, says("POST takes the job back.")]
    replay: Annotated[Link, says("POST accepts a job with the same parameters.")]
    events: Annotated[Link, says("GET follows the job as server-sent events.")]


@document("A job and its state.")
class JobHead:
    """The first members of every document of a job."""

    id: UUID
    object: Literal["job"] = "job"
    state: Annotated[State, says("How it stands.")]


@document("A job: all that was asked for, how it stands, and its images.")
class Job(Parameters, JobHead):
    prompt: Annotated[str | None, says("What the images show; null once the job was erased.")]
    negative_prompt: Annotated[str | None, says("What they do not show; null once it was erased.")]
    seed: Annotated[int, says("The seed of image 0; image i has seed + i.")]
    metadata: Annotated[dict[str, str], says("The tenant's own, as it was sent.")]
    replay_of: Annotated[UUID | None, says("The job whose parameters these are.")]
    megapixel_steps: Annotated[float, says("What it counts against budgets and quotas.")]
    attempt: Annotated[int, says("How often workers have begun it.")]
    failure: Annotated[Failure | None, says("Why there are no images; null if there are.")]
    warnings: Annotated[list[JobWarning], says("What was asked for and has no effect.")]
    created_at: Annotated[Instant, says("When it was accepted.")]
    start_by: Annotated[Instant, says("It expires if it was not begun by then.")]
    started_at: Annotated[Instant | None, says("When a worker first began it.")]
    rendered_at: Annotated[Instant | None, says("When its last pixels were there.")]
    finished_at: Annotated[Instant | None, says("When it came to its final state.")]
    run_by: Annotated[Instant | None, says("It fails if it was not rendered by then.")]
    erased_at: Annotated[Instant | None, says("When its texts and images were deleted.")]
    progress: Annotated[Progress | None, says("How far it is; null while it waits.")]
    queue: Annotated[QueuePlace | None, says("Where it stands; null once it has ended.")]
    timing: Annotated[Timing, says("How long it took.")]
    cost: Annotated[Cost | None, says("What it cost; null until that is known.")]
    images: Annotated[list[Image], says("Its images, by index.")]
    urls: Annotated[JobUrls, says("Links of the job.")]


@document("The little of a job that changes while one waits for it.")
class JobStatus:
    id: UUID
    object: Literal["job.status"] = "job.status"
    state: Annotated[State, says("How it stands.")]
    attempt: Annotated[int, says("How often workers have begun it.")]
    progress: Annotated[Progress | None, says("How far it is; null while it waits.")]
    queue: Annotated[QueuePlace | None, says("Where it stands; null once it has ended.")]
    images_done: Annotated[int, says("Images that are stored.")]
    n: Annotated[int, says("Of so many.")]
    failure: Annotated[Failure | None, says("Why there are no images; null if there are.")]
    warnings: Annotated[list[JobWarning], says("What was asked for and has no effect.")]
    erased_at: Annotated[Instant | None, says("When its texts and images were deleted.")]
    urls: Annotated[JobUrls, says("Links of the job.")]


@document("Jobs, newest first.")
class JobPage(Page):
    data: Annotated[list[Job], says("The jobs of this page.")]


@document("What a batch shows of a job that it came to.")
class BatchJob(JobHead):
    tier: Annotated[str, says("The tier that serves it.")]
    model: Annotated[str, says("The id of its model.")]
    model_alias: Annotated[str | None, says("What the request called the model, if not by its id.")]
    model_version: Annotated[str, says("The version of the model.")]
    seed: Annotated[int, says("The seed of image 0; image i has seed + i.")]
    n: Annotated[int, says("How many images.")]
    urls: Annotated[JobUrls, says("Links of the job.")]


@document("An item of a batch that was accepted.")
class BatchAccepted:
    status: Annotated[Literal[202], says("What POST /v1/jobs would have answered with.")] = 202
    job: BatchJob


@document("An item of a batch that was refused.")
class BatchRefused:
    status: Annotated[int, says("What POST /v1/jobs would have answered with.")]
    problem: RefusedItem


@document("What a batch came to: its items, in the order in which they were sent.")
class Batch:
    object: Literal["batch"] = "batch"
    accepted: Annotated[int, says("How many items are jobs now.")]
    refused: Annotated[int, says("How many are not.")]
    data: Annotated[list[BatchAccepted | BatchRefused], says("What became of each item.")]


@document("The job that the same body would be at POST /v1/jobs, its price and its wait.")
class Estimate(Parameters):
    object: Literal["estimate"] = "estimate"
    prompt: Annotated[str, says("What the images show.")]
    negative_prompt: Annotated[str, says("What they do not show.")]
    seed: Annotated[int | None, says("The seed that was asked for; null for one that is drawn.")]
    metadata: Annotated[dict[str, str], says("The tenant's own, as it was sent.")]
    start_deadline_s: Annotated[float, says("Seconds within which the job would have to start.")]
    warnings: Annotated[list[JobWarning], says("What was asked for and has no effect.")]
    megapixel_steps: Annotated[float, says("What it would count against budgets and quotas.")]
    cost: Annotated[Cost, says("What it is expected to cost.")]
    queue: Annotated[QueuePlace | None, says("Where it would stand.")]
    can_be_served: Annotated[bool, says("Whether it would be accepted now.")]
    refusal: Annotated[Refusal | None, says("Why it would not be; null if it would.")]
