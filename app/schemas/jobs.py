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
from policy.warnings import CODES

State = Annotated[str, one_of(JobState)]
OutputFormat = Annotated[str, one_of(FORMATS)]


@with_config(kept("An adapter (LoRA) of the model and its strength."))
class Adapter(TypedDict):
    name: Annotated[str, says("The name of an adapter of the model.")]
    strength: Annotated[float, says("1 is its full effect, 0 none; a negative value inverts it.")]


@with_config(kept("A part of the request that has no effect; the job is served all the same."))
class JobWarning(TypedDict):
    code: Annotated[str, one_of(CODES), says("The kind of warning.")]
    field: Annotated[str, says("The field of the request that has no effect, or not all of it.")]
    detail: Annotated[str, says("The warning as a sentence.")]
    tokens_given: NotRequired[Annotated[int, says("How many tokens the text has.")]]
    tokens_read: NotRequired[Annotated[int, says("How many of them the model reads.")]]


@document("Every parameter of a job, including those that the request left out.")
@with_params(SHOWN)
class Parameters:
    """The parameters that clients see, of a job and of an estimate.

    Listed here are those that JSON shows differently from the column of the same name.
    """

    size: Annotated[Size, says("Width and height in pixels.", examples=["128x128"])]
    prompt: Annotated[str | None, says("What the images show.")]
    negative_prompt: Annotated[str | None, says("What the images should not show.")]
    seed: Annotated[int | None, says("The seed of image 0; image i has seed + i.")]
    output_format: Annotated[OutputFormat, says("The format of the images.")]
    adapters: Annotated[list[Adapter], says("Adapters (LoRA) of the model.")]
    determinism: Annotated[
        Literal["best_effort", "reproducible"],
        says(
            "`reproducible`: the same parameters give the same pixels on the same class of device."
        ),
    ]


@document("The place of an unfinished job in its queue, and when it should end.")
class QueuePlace:
    jobs_ahead: Annotated[
        int | None, says("Jobs of its tier that are before it; null once it runs.")
    ]
    eta_p50_s: Annotated[float, says("Seconds until its images are stored, in half of all cases.")]
    eta_p90_s: Annotated[float, says("Seconds until its images are stored, in nine cases of ten.")]


@document("The progress of a job, summed over its images.")
class Progress:
    step: Annotated[int, says("Denoise steps that are done.")]
    num_steps: Annotated[int, says("Denoise steps in all.")]
    images_done: Annotated[int, says("The number of images that are stored.")]


@document("Why a job failed.")
class Failure:
    code: Annotated[
        str,
        says("The reason, as a word for programs.", examples=[code.value for code in FailureCode]),
    ]
    detail: Annotated[str | None, says("The reason as a sentence; null if it is internal.")]


@document("How many seconds each part of a job took; null for a part that has not ended.")
class Timing:
    queue_s: Annotated[float | None, says("From its acceptance to its first start.")]
    render_s: Annotated[
        float | None, says("From its first start until its last image was rendered.")
    ]
    store_s: Annotated[float | None, says("From then until its end.")]
    total_s: Annotated[float | None, says("From its acceptance to its end.")]


@document("The cost of a job.")
class Cost:
    gpu_seconds: Annotated[float, says("Seconds of a GPU that its images took.")]
    amount: Annotated[str, says("The price, as a decimal number.", examples=["0.000123"])]
    currency: Annotated[str, says("The currency of the price.")]


@document("One image of a job.")
class Image:
    index: Annotated[int, says("Its place in the job, from 0.")]
    seed: Annotated[int, says("The seed of this image.")]
    state: Annotated[Annotated[str, one_of(ImageState)], says("The state of the image.")]
    url: Annotated[Link | None, says("Link to the image; null if it is not stored.")]
    pixels_sha256: Annotated[
        Sha256 | None, says("SHA-256 of its RGB pixels; equal for equal images.")
    ]
    content_sha256: Annotated[Sha256 | None, says("SHA-256 of the file.")]
    content_type: Annotated[str | None, says("The media type of the file.")]
    size_bytes: Annotated[int | None, says("The size of the file.")]
    width_px: Annotated[int | None, says("The width in pixels.")]
    height_px: Annotated[int | None, says("The height in pixels.")]


@document("Links to the job and to what can be done with it.")
class JobUrls:
    self: Annotated[Link, says("GET shows the job, DELETE erases it.")]
    status: Annotated[Link, says("GET shows its state and progress.")]
    cancel: Annotated[Link, says("POST cancels the job.")]
    replay: Annotated[Link, says("POST creates a job with the same parameters.")]
    events: Annotated[Link, says("GET streams its events (server-sent events).")]


@document("A job and its state.")
class JobHead:
    """The first members of every document of a job."""

    id: UUID
    object: Literal["job"] = "job"
    state: Annotated[State, says("The state of the job.")]


@document("A job: its parameters, its state and its images.")
class Job(Parameters, JobHead):
    prompt: Annotated[str | None, says("What the images show; null once the job was erased.")]
    negative_prompt: Annotated[
        str | None, says("What the images should not show; null once the job was erased.")
    ]
    seed: Annotated[int, says("The seed of image 0; image i has seed + i.")]
    metadata: Annotated[dict[str, str], says("Your own entries, as they were sent.")]
    replay_of: Annotated[
        UUID | None, says("The job that this one repeats; null if it repeats none.")
    ]
    megapixel_steps: Annotated[float, says("Megapixel-steps that count against budget and quotas.")]
    attempt: Annotated[int, says("How many times a worker has started it.")]
    failure: Annotated[Failure | None, says("Why the job failed; null if it did not.")]
    warnings: Annotated[list[JobWarning], says("Parts of the request that have no effect.")]
    prompt_tokens: Annotated[
        int | None,
        says("Tokens of the prompt; null until an image is rendered, or if nobody can tell."),
    ]
    truncated_tokens: Annotated[
        int | None, says("Those of them that the model did not read, at the end; null likewise.")
    ]
    created_at: Annotated[Instant, says("When it was accepted.")]
    start_by: Annotated[Instant, says("The job expires if no worker has started it by then.")]
    started_at: Annotated[Instant | None, says("When a worker first started it.")]
    rendered_at: Annotated[Instant | None, says("When its last image was rendered.")]
    finished_at: Annotated[Instant | None, says("When it reached its final state.")]
    run_by: Annotated[Instant | None, says("The job fails if it is not rendered by then.")]
    erased_at: Annotated[
        Instant | None, says("When its prompts, metadata and images were deleted.")
    ]
    progress: Annotated[Progress | None, says("How far it has come; null while it waits.")]
    queue: Annotated[QueuePlace | None, says("Its place in the queue; null once it has ended.")]
    timing: Annotated[Timing, says("How long it took.")]
    cost: Annotated[Cost | None, says("What it cost; null until this is known.")]
    images: Annotated[list[Image], says("Its images, by index.")]
    urls: Annotated[JobUrls, says("Links to the job and to what can be done with it.")]


@document("The members of a job that change until it ends.")
class JobStatus:
    id: UUID
    object: Literal["job.status"] = "job.status"
    state: Annotated[State, says("The state of the job.")]
    attempt: Annotated[int, says("How many times a worker has started it.")]
    progress: Annotated[Progress | None, says("How far it has come; null while it waits.")]
    queue: Annotated[QueuePlace | None, says("Its place in the queue; null once it has ended.")]
    images_done: Annotated[int, says("The number of images that are stored.")]
    n: Annotated[int, says("The number of images in all.")]
    failure: Annotated[Failure | None, says("Why the job failed; null if it did not.")]
    warnings: Annotated[list[JobWarning], says("Parts of the request that have no effect.")]
    erased_at: Annotated[
        Instant | None, says("When its prompts, metadata and images were deleted.")
    ]
    urls: Annotated[JobUrls, says("Links to the job and to what can be done with it.")]


@document("Jobs, newest first.")
class JobPage(Page):
    data: Annotated[list[Job], says("The jobs of this page.")]


@document("A job that was created by a batch, in short.")
class BatchJob(JobHead):
    tier: Annotated[str, says("The tier of the job.")]
    model: Annotated[str, says("The id of the model.")]
    model_alias: Annotated[
        str | None, says("The alias by which the request named the model, if any.")
    ]
    model_version: Annotated[str, says("The version of the model.")]
    seed: Annotated[int, says("The seed of image 0; image i has seed + i.")]
    n: Annotated[int, says("The number of images.")]
    urls: Annotated[JobUrls, says("Links to the job and to what can be done with it.")]


@document("An item of a batch that was accepted.")
class BatchAccepted:
    status: Annotated[
        Literal[202], says("The status that POST /v1/jobs would have answered with.")
    ] = 202
    job: BatchJob


@document("An item of a batch that was refused.")
class BatchRefused:
    status: Annotated[int, says("The status that POST /v1/jobs would have answered with.")]
    problem: RefusedItem


@document("The result of a batch: its items, in the order in which they were sent.")
class Batch:
    object: Literal["batch"] = "batch"
    accepted: Annotated[int, says("The number of items that became jobs.")]
    refused: Annotated[int, says("The number of items that were refused.")]
    data: Annotated[list[BatchAccepted | BatchRefused], says("The result of each item.")]


@document("The job that POST /v1/jobs would create, with its price and its wait.")
class Estimate(Parameters):
    object: Literal["estimate"] = "estimate"
    prompt: Annotated[str, says("What the images show.")]
    negative_prompt: Annotated[str, says("What the images should not show.")]
    seed: Annotated[
        int | None, says("The seed in the request; null if it would be chosen at random.")
    ]
    metadata: Annotated[dict[str, str], says("Your own entries, as they were sent.")]
    start_deadline_s: Annotated[
        float, says("Seconds within which a worker would have to start the job.")
    ]
    warnings: Annotated[list[JobWarning], says("Parts of the request that have no effect.")]
    megapixel_steps: Annotated[
        float, says("Megapixel-steps that would count against budget and quotas.")
    ]
    cost: Annotated[Cost, says("The expected cost.")]
    queue: Annotated[QueuePlace | None, says("The place that it would have in the queue.")]
    can_be_served: Annotated[bool, says("Whether the job would be accepted now.")]
    refusal: Annotated[
        Refusal | None, says("Why the job would be refused; null if it would be accepted.")
    ]
