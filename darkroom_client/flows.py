"""Define the requests and retries of each client method, as generators that do no I/O themselves.

A flow yields what is to be done. It is sent the outcome, or the httpx error is thrown into it. Its
return value is the method's answer. `Client` and `AsyncClient` run the same flows in two ways.
"""

import hashlib
import itertools
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx

from darkroom_client import answers, downloads, wire
from darkroom_client.answers import Page
from darkroom_client.documents import Estimate, File, Status, Submission, Usage
from darkroom_client.errors import (
    DigestMismatch,
    ImageNotStored,
    UnexpectedAnswer,
    Unreachable,
    WaitTimeout,
)
from darkroom_client.job_fields import PICTURE_FIELDS, Picture, to_upload
from darkroom_client.jobs import Job
from darkroom_client.retries import Retries, is_hopeless, is_passing, retry_after_s
from darkroom_client.wire import ApiRequest

_POLL_EVERY_S = 0.15
_POLL_AT_LEAST_EVERY_S = 1.0
_LONGEST_HOLD_S = 30  # the gateway would hold an answer for 60 s; proxies on the way may not


@dataclass(frozen=True)
class Fetch:
    """Get a presigned URL from the object store: without the key, for the URL is the permission."""

    url: str


@dataclass(frozen=True)
class Pause:
    """Wait."""

    seconds: float


@dataclass(frozen=True)
class DiskWork:
    """Do something with the disk, where nobody has to wait for it."""

    do: Callable[[], Any]


Step = ApiRequest | Fetch | Pause | DiskWork
Result = TypeVar("Result")
Flow = Generator[Step, Any, Result]


class Flows:
    """Every method of the clients."""

    def __init__(self, url: str, retries: Retries) -> None:
        self._url = url
        self._retries = retries
        self._store_is_far = False

    def create_job(self, prompt: str, fields: Mapping[str, Any], key: str | None) -> Flow[Job]:
        said = yield from self._with_pictures({"prompt": prompt, **fields})
        return answers.read_job(
            (yield from self._sent(wire.create_job(said, key or wire.new_key())))
        )

    def create_jobs(
        self, jobs: Sequence[Mapping[str, Any]], key: str | None
    ) -> Flow[tuple[Submission, ...]]:
        said = []
        known = dict[bytes | Path, str]()
        for fields in jobs:
            said.append((yield from self._with_pictures(fields, known)))
        return answers.read_submissions(
            (yield from self._sent(wire.create_jobs(said, key or wire.new_key())))
        )

    def estimate(self, prompt: str, fields: Mapping[str, Any]) -> Flow[Estimate]:
        said = yield from self._with_pictures({"prompt": prompt, **fields})
        return answers.read_estimate((yield from self._sent(wire.estimate(said))))

    def replay(self, job_id: str, key: str | None) -> Flow[Job]:
        return answers.read_job(
            (yield from self._sent(wire.replay_job(job_id, key or wire.new_key())))
        )

    def job(self, job_id: str, wait_s: int | None) -> Flow[Job]:
        return answers.read_job((yield from self._sent(wire.show_job(job_id, wait_s))))

    def status(self, job_id: str) -> Flow[Status]:
        return answers.read_status((yield from self._sent(wire.show_status(job_id))))

    def page(self, **filters: Any) -> Flow[Page]:
        return answers.read_page((yield from self._sent(wire.list_jobs(**filters))))

    def cancel(self, job_id: str) -> Flow[Job]:
        return answers.read_job((yield from self._sent(wire.cancel_job(job_id))))

    def delete(self, job_id: str) -> Flow[None]:
        answers.read_nothing((yield from self._sent(wire.delete_job(job_id))))

    def wait(
        self, job_id: str, timeout_s: float, on_progress: Callable[[Job], None] | None
    ) -> Flow[Job]:
        started_at = time.monotonic()
        while True:
            spent_s = time.monotonic() - started_at
            remaining_s = max(0.0, timeout_s - spent_s)
            job = yield from self.job(
                job_id, None if on_progress else min(_LONGEST_HOLD_S, int(remaining_s))
            )
            if on_progress:
                on_progress(job)
            if job.is_finished:
                return job
            if remaining_s <= 0:
                raise WaitTimeout(f"job {job_id} is still {job.state} after {timeout_s:g} s", job)
            # In a long wait frequent polling is useless, and the tenant's request rate is limited.
            yield Pause(
                min(max(_POLL_EVERY_S, min(spent_s / 20, _POLL_AT_LEAST_EVERY_S)), remaining_s)
            )

    def image(self, job: Job | str, index: int) -> Flow[bytes]:
        known = (yield from self.job(job, None)) if isinstance(job, str) else job
        expected = next(
            (image.content_sha256 for image in known.images if image.index == index), None
        )
        if expected is None:
            raise ImageNotStored(f"job {known.id} is {known.state} and has no stored image {index}")
        answer = yield from self._sent(wire.show_image(known.id, index, direct=self._store_is_far))
        if not answer.is_success:  # a redirect, unless images come through the gateway
            answer = yield from self._fetched(known.id, index, answers.read_location(answer))
        content: bytes = answer.content
        if hashlib.sha256(content).hexdigest() != expected:
            raise DigestMismatch(
                f"image {index} of job {known.id}: "
                f"{len(content)} bytes came that are not the stored ones"
            )
        return content

    def _fetched(self, job_id: str, index: int, url: str) -> Flow[httpx.Response]:
        """Fetch the image from the object store, or else from the gateway.

        The gateway serves this image when the store refuses. Once the store could not be reached,
        the gateway serves all later images too.
        """
        try:
            answer = yield from self._sent(Fetch(url))
            if answer.is_success:
                return answer
            raise UnexpectedAnswer(
                f"the object store answered {answer.status_code} for image {index} of job {job_id}"
            )
        except (Unreachable, UnexpectedAnswer) as error:
            is_far = isinstance(error, Unreachable)  # a refusal may be over the next time
            direct = yield from self._sent(wire.show_image(job_id, index, direct=True))
            if not direct.is_success:  # a gateway that always redirects
                raise
            self._store_is_far = is_far
            return direct

    def download(self, job: Job | str, folder: Path, names: str) -> Flow[tuple[Path, ...]]:
        known = (yield from self.job(job, None)) if isinstance(job, str) else job
        paths = []
        for image in known.images:
            if image.content_sha256 is not None:
                path = downloads.path_of(folder, known, image, names)
                if not (yield DiskWork(partial(downloads.is_there, path, image.content_sha256))):
                    content = yield from self.image(known, image.index)
                    yield DiskWork(partial(downloads.write, path, content))
                paths.append(path)
        return tuple(paths)

    def upload(self, picture: Picture) -> Flow[File]:
        content: bytes = (
            picture if isinstance(picture, bytes) else (yield DiskWork(Path(picture).read_bytes))
        )
        name = "picture" if isinstance(picture, bytes) else Path(picture).name
        return answers.read_file((yield from self._sent(wire.upload(name, content))))

    def usage(self) -> Flow[Usage]:
        return answers.read_usage((yield from self._sent(wire.show_usage())))

    def list_of(self, resource: str) -> Flow[list[dict[str, Any]]]:
        return list(answers.read_object((yield from self._sent(wire.list_of(resource))))["data"])

    def _with_pictures(
        self, fields: Mapping[str, Any], known: dict[bytes | Path, str] | None = None
    ) -> Flow[dict[str, Any]]:
        """Return the fields with a file id in place of each picture that had to be uploaded.

        known: the ids of pictures that were uploaded already; new ones are added to it.
        """
        said = dict(fields)
        known = {} if known is None else known
        for field in PICTURE_FIELDS:
            picture = to_upload(said.get(field))
            if picture is not None:
                if picture not in known:
                    known[picture] = (yield from self.upload(picture)).id
                said[field] = known[picture]
        return said

    def _sent(self, step: ApiRequest | Fetch) -> Flow[httpx.Response]:
        """Send until there is an answer or no try is left. Raises Unreachable."""
        for attempt in itertools.count(1):
            try:
                answer: httpx.Response = yield step
            except httpx.InvalidURL as error:
                raise Unreachable(f"{self._where(step)} is not a valid address: {error}") from error
            except httpx.TransportError as error:
                pause_s = None if is_hopeless(error) else self._retries.pause_s(attempt)
                if pause_s is None:
                    raise self._unreachable(step, attempt, error) from error
            else:
                passes = is_passing(answer)
                pause_s = self._retries.pause_s(attempt, retry_after_s(answer)) if passes else None
                if pause_s is None:
                    return answer
            yield Pause(pause_s)
        raise AssertionError("the tries never end by themselves")

    def _unreachable(self, step: ApiRequest | Fetch, attempt: int, error: Exception) -> Unreachable:
        tried = f" after {attempt} tries" if attempt > 1 else ""
        why = error or type(error).__name__
        return Unreachable(f"{self._where(step)} does not answer{tried}: {why}")

    def _where(self, step: ApiRequest | Fetch) -> str:
        if isinstance(step, ApiRequest):
            return self._url
        return step.url.partition("?")[0]  # what follows is a permission
