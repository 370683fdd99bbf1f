"""Define events of a job's stream, and the bodies that are sent to webhooks."""

from typing import Annotated, Literal

from app.schemas.base import Instant, Link, Sha256, document, one_of, says
from app.schemas.jobs import JobHead
from policy.failures import FailureCode
from policy.states import ImageState
from policy.webhooks import BUDGET_EVENT, ENDED_EVENTS, TEST_EVENT


@document("The job waits; sent again when the forecast changes.")
class QueuedEvent:
    jobs_ahead: Annotated[int | None, says("Jobs of its tier that are before it; null if unknown.")]
    eta_p50_s: Annotated[
        float | None, says("Seconds until its images are stored, in half of all cases.")
    ]
    eta_p90_s: Annotated[
        float | None, says("Seconds until its images are stored, in nine cases of ten.")
    ]


@document("A worker has started the job.")
class StartedEvent:
    attempt: Annotated[int, says("How many times a worker has started it.")]


@document("An image has done another denoise step.")
class StepEvent:
    index: Annotated[int, says("The index of the image in the job, from 0.")]
    step: Annotated[int, says("Denoise steps that are done.")]
    num_steps: Annotated[int, says("Denoise steps in all.")]


@document("A preview of an unfinished image.")
class PreviewEvent(StepEvent):
    jpeg_base64: Annotated[str, says("A small JPEG.", contentEncoding="base64")]
    width_px: Annotated[int, says("The width in pixels.")]
    height_px: Annotated[int, says("The height in pixels.")]


@document("An image is stored.")
class StoredEvent:
    index: Annotated[int, says("The index of the image in the job, from 0.")]
    seed: Annotated[int, says("The seed of this image.")]
    pixels_sha256: Annotated[Sha256, says("SHA-256 of its RGB pixels; equal for equal images.")]
    content_sha256: Annotated[Sha256, says("SHA-256 of the file.")]
    content_type: Annotated[str, says("The media type of the file.")]
    size_bytes: Annotated[int, says("The size of the file.")]
    width_px: Annotated[int, says("The width in pixels.")]
    height_px: Annotated[int, says("The height in pixels.")]
    url: Annotated[Link, says("Link to the image.")]


AbsoluteLink = Annotated[
    str, says("An absolute URL if the operator has set PUBLIC_URL, else a path.")
]


@document("An image that was not stored.")
class MissingImage:
    index: Annotated[int, says("Its place in the job, from 0.")]
    seed: Annotated[int, says("The seed that it would have had.")]
    state: Annotated[Annotated[str, one_of(ImageState)], says("The state of the image.")]
    url: Annotated[None, says("Null: there is no image.")]


@document("A stored image in the message of a webhook.")
class StoredImage:
    index: Annotated[int, says("Its place in the job, from 0.")]
    seed: Annotated[int, says("The seed of this image.")]
    state: Annotated[Literal["stored"], says("The state of the image.")]
    pixels_sha256: Annotated[Sha256, says("SHA-256 of its RGB pixels; equal for equal images.")]
    content_sha256: Annotated[Sha256, says("SHA-256 of the file.")]
    content_type: Annotated[str, says("The media type of the file.")]
    size_bytes: Annotated[int, says("The size of the file.")]
    width_px: Annotated[int, says("The width in pixels.")]
    height_px: Annotated[int, says("The height in pixels.")]
    url: AbsoluteLink


@document("Why the job failed.")
class FailureCodeOnly:
    code: Annotated[
        str,
        says("The reason, as a word for programs.", examples=[code.value for code in FailureCode]),
    ]


@document("The cost of the job.")
class Price:
    amount: Annotated[str, says("The price, as a decimal number.", examples=["0.000123"])]
    currency: Annotated[str, says("The currency of the price.")]


@document("A link to the job.")
class JobLink:
    self: AbsoluteLink


@document("A job that has ended, without its prompts.")
class EndedJob(JobHead):
    tier: Annotated[str, says("The tier of the job.")]
    model: Annotated[str, says("The id of the model.")]
    model_version: Annotated[str, says("The version of the model.")]
    seed: Annotated[int, says("The seed of image 0; image i has seed + i.")]
    n: Annotated[int, says("The number of images.")]
    metadata: Annotated[dict[str, str], says("Your own entries, as they were sent.")]
    failure: Annotated[FailureCodeOnly | None, says("Why the job failed; null if it did not.")]
    cost: Annotated[Price | None, says("What it cost.")]
    created_at: Annotated[Instant, says("When it was accepted.")]
    started_at: Annotated[Instant | None, says("When a worker first started it.")]
    finished_at: Annotated[Instant | None, says("When it reached its final state.")]
    images: Annotated[list[StoredImage | MissingImage], says("Its images, by index.")]
    urls: JobLink


@document("A job has ended. Every attempt to deliver this message sends the same body.")
class JobMessage:
    type: Annotated[
        Annotated[str, one_of(ENDED_EVENTS)],
        says("The event: `job.` and the final state of the job."),
    ]
    timestamp: Annotated[Instant, says("When the job ended.")]
    data: EndedJob


@document("A part of the tenant's monthly budget that is spent.")
class SpentBudget:
    month: Annotated[str, says("The UTC month, such as `2026-11`.")]
    percent: Annotated[int, says("The threshold that was reached: 50, 80 or 100 per cent.")]
    budget: Annotated[str, says("The budget, as a decimal number.")]
    spent: Annotated[str, says("What was spent by then, as a decimal number.")]
    currency: Annotated[str, says("The currency of both.")]


@document("A tenant has spent a part of its monthly budget. Each is told once a month.")
class BudgetMessage:
    type: Annotated[Annotated[str, one_of([BUDGET_EVENT])], says("The type of these messages.")]
    timestamp: Annotated[Instant, says("When it was noticed.")]
    data: SpentBudget


@document("Empty: a test has no data.")
class Nothing:
    pass


@document("A test of the endpoint, sent on request.")
class TestMessage:
    type: Annotated[Annotated[str, one_of([TEST_EVENT])], says("The type of every test message.")]
    timestamp: Annotated[Instant, says("When it was sent.")]
    data: Nothing


STREAM = {
    "queued": QueuedEvent,
    "started": StartedEvent,
    "step": StepEvent,
    "preview": PreviewEvent,
    "stored": StoredEvent,
}  # and `final`, with the whole job
