"""Define events of a job's stream, and the bodies that are sent to webhooks."""

from typing import Annotated, Literal

from app.schemas.base import Instant, Link, Sha256, document, one_of, says
from app.schemas.jobs import JobHead
from policy.failures import FailureCode
from policy.states import ImageState
from policy.webhooks import EVENTS, TEST_EVENT


@document("The job waits; told again when the forecast has changed.")
class QueuedEvent:
    jobs_ahead: Annotated[int | None, says("Jobs of its tier before it; null if not known.")]
    eta_p50_s: Annotated[float | None, says("Seconds until its images are stored: the median.")]
    eta_p90_s: Annotated[float | None, says("The same in nine cases of ten.")]


@document("A worker has begun the job.")
class StartedEvent:
    attempt: Annotated[int, says("How often workers have begun it.")]


@document("An image has come so far.")
class StepEvent:
    index: Annotated[int, says("The image's place in the job.")]
    step: Annotated[int, says("Steps that are done.")]
    num_steps: Annotated[int, says("Of so many.")]


@document("What an image looks like by now.")
class PreviewEvent(StepEvent):
    jpeg_base64: Annotated[str, says("A small JPEG.", contentEncoding="base64")]
    width_px: Annotated[int, says("Its width.")]
    height_px: Annotated[int, says("Its height.")]


@document("An image is stored.")
class StoredEvent:
    index: Annotated[int, says("The image's place in the job.")]
    seed: Annotated[int, says("The seed that it was made from.")]
    pixels_sha256: Annotated[Sha256, says("Of its RGB pixels.")]
    content_sha256: Annotated[Sha256, says("Of the file.")]
    content_type: Annotated[str, says("Of the file.")]
    size_bytes: Annotated[int, says("Of the file.")]
    width_px: Annotated[int, says("Its width.")]
    height_px: Annotated[int, says("Its height.")]
    url: Annotated[Link, says("Where it is found.")]


AbsoluteLink = Annotated[str, says("Absolute where the operator has set PUBLIC_URL; else a path.")]


@document("An image of a job that gave no such image.")
class MissingImage:
    index: Annotated[int, says("Its place in the job, from 0.")]
    seed: Annotated[int, says("The seed that it would be made from.")]
    state: Annotated[Annotated[str, one_of(ImageState)], says("How it stands.")]
    url: Annotated[None, says("There is none.")]


@document("A stored image, as webhooks tell of it.")
class StoredImage:
    index: Annotated[int, says("Its place in the job, from 0.")]
    seed: Annotated[int, says("The seed that it was made from.")]
    state: Annotated[Literal["stored"], says("How it stands.")]
    pixels_sha256: Annotated[Sha256, says("Of its RGB pixels: tells same images apart.")]
    content_sha256: Annotated[Sha256, says("Of the file.")]
    content_type: Annotated[str, says("Of the file.")]
    size_bytes: Annotated[int, says("Of the file.")]
    width_px: Annotated[int, says("Its width.")]
    height_px: Annotated[int, says("Its height.")]
    url: AbsoluteLink


@document("Why the job gave no images.")
class FailureCodeOnly:
    code: Annotated[str, says("What it was.", examples=[code.value for code in FailureCode])]


@document("What the job cost.")
class Price:
    amount: Annotated[str, says("The price, as a decimal number.", examples=["0.000123"])]
    currency: Annotated[str, says("The currency of the price.")]


@document("Where the job is found.")
class JobLink:
    self: AbsoluteLink


@document("A job that has ended, without its texts.")
class EndedJob(JobHead):
    tier: Annotated[str, says("The tier that served it.")]
    model: Annotated[str, says("The id of its model.")]
    model_version: Annotated[str, says("The version of the model.")]
    seed: Annotated[int, says("The seed of image 0; image i has seed + i.")]
    n: Annotated[int, says("How many images.")]
    metadata: Annotated[dict[str, str], says("The tenant's own, as it was sent.")]
    failure: Annotated[FailureCodeOnly | None, says("Why there are no images.")]
    cost: Annotated[Price | None, says("What it cost.")]
    created_at: Annotated[Instant, says("When it was accepted.")]
    started_at: Annotated[Instant | None, says("When a worker first began it.")]
    finished_at: Annotated[Instant | None, says("When it came to its final state.")]
    images: Annotated[list[StoredImage | MissingImage], says("Its images, by index.")]
    urls: JobLink


@document("A job has ended. The same at every attempt to deliver it.")
class JobMessage:
    type: Annotated[Annotated[str, one_of(EVENTS)], says("The state that the job came to.")]
    timestamp: Annotated[Instant, says("When it did.")]
    data: EndedJob


@document("Nothing; there is nothing to tell of a test.")
class Nothing:
    pass


@document("A test that was asked for.")
class TestMessage:
    type: Annotated[Annotated[str, one_of([TEST_EVENT])], says("That it is a test.")]
    timestamp: Annotated[Instant, says("When it was sent.")]
    data: Nothing


STREAM = {
    "queued": QueuedEvent,
    "started": StartedEvent,
    "step": StepEvent,
    "preview": PreviewEvent,
    "stored": StoredEvent,
}  # and `final`, with the whole job
