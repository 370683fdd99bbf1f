"""Provide the blocking client. flows.py says which requests it sends; this module sends them."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

import httpx

from darkroom_client.address import GatewayAddress
from darkroom_client.documents import Estimate, File, Status, Submission, Usage
from darkroom_client.events import Event, EventStream, is_stream
from darkroom_client.flows import DiskWork, Fetch, Flow, Flows, Pause, Result, Step
from darkroom_client.job_fields import JobFields, Picture
from darkroom_client.jobs import Job
from darkroom_client.retries import Retries


class Client:
    """Use Darkroom at `url` as the tenant of `api_key`.

    Safe to share among threads; close it when done.

    url, api_key: by default DARKROOM_URL and DARKROOM_API_KEY of the environment.  timeout_s: a
    request without an answer for so long counts as lost.  retries: how lost requests are repeated.

    Every method raises Unreachable when nothing answers, and ProblemError when the gateway refuses.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = 30.0,
        retries: Retries = Retries(),
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        address = GatewayAddress.resolved(url, api_key)
        self._flows = Flows(address.url, retries)
        self._retries = retries
        self._timeout_s = timeout_s
        self._gateway = httpx.Client(
            base_url=address.url, headers=address.headers, transport=transport, **address.options
        )
        self._store = httpx.Client(transport=transport, **address.options, timeout=2 * timeout_s)

    def create_job(
        self, prompt: str, *, idempotency_key: str | None = None, **fields: Unpack[JobFields]
    ) -> Job:
        """Create a job; return it with every parameter filled in.

        fields: those of `JobFields`; the gateway fills in what is left out.  idempotency_key: give
        the same key in a later call, also from another process, to get the same job. Lost answers
        and full queues are tried again without creating a second job.
        """
        return self._run(self._flows.create_job(prompt, fields, idempotency_key))

    def create_jobs(
        self, jobs: Sequence[Mapping[str, Any]], *, idempotency_key: str | None = None
    ) -> tuple[Submission, ...]:
        """Create up to 1,000 jobs in one request; some of them may be refused.

        jobs: mappings with `prompt` and fields of `JobFields`.
        """
        return self._run(self._flows.create_jobs(jobs, idempotency_key))

    def estimate(self, prompt: str, **fields: Unpack[JobFields]) -> Estimate:
        """Estimate the job that `create_job` would create now, without creating it.

        The answer has every parameter, the cost and the time, and tells whether the job would be
        accepted.
        """
        return self._run(self._flows.estimate(prompt, fields))

    def replay(self, job_id: str, *, idempotency_key: str | None = None) -> Job:
        """Create a job with exactly the parameters of that job.

        In a tier that is reproducible, its images have the same pixels.
        """
        return self._run(self._flows.replay(job_id, idempotency_key))

    def job(self, job_id: str, wait_s: int | None = None) -> Job:
        """Return the job in its present state.

        wait_s: wait until the job is finished, at most so many seconds.
        """
        return self._run(self._flows.job(job_id, wait_s))

    def status(self, job_id: str) -> Status:
        """Return the job's state, progress and place in the queue.

        This costs the gateway less than the whole job.
        """
        return self._run(self._flows.status(job_id))

    def jobs(
        self,
        *,
        state: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
        page_size: int = 50,
    ) -> Iterator[Job]:
        """Iterate over the tenant's jobs, newest first; each page is fetched when it is needed.

        The filters select jobs of one state, of a time span, and with all the given metadata.
        """
        cursor = None
        while True:
            filters = {
                "state": state,
                "since": since,
                "until": until,
                "metadata": metadata,
                "limit": page_size,
            }
            page = self._run(self._flows.page(**filters, cursor=cursor))
            yield from page.jobs
            if page.next_cursor is None:
                return
            cursor = page.next_cursor

    def cancel(self, job_id: str) -> Job:
        """Cancel the job and return it. Raises ProblemError if it is finished already."""
        return self._run(self._flows.cancel(job_id))

    def delete(self, job_id: str) -> None:
        """Erase the job's prompts, metadata and images. Its cost and its audit events stay."""
        self._run(self._flows.delete(job_id))

    def wait(
        self, job_id: str, timeout_s: float = 300, on_progress: Callable[[Job], None] | None = None
    ) -> Job:
        """Wait until the job is finished, however it ended, and return it. Raises WaitTimeout.

        on_progress: called with the job several times a second at first, then less often, and a
        last time when the job is finished.
        """
        return self._run(self._flows.wait(job_id, timeout_s, on_progress))

    def events(
        self, job_id: str, *, previews: bool = False, after: str | None = None
    ) -> Iterator[Event]:
        """Iterate over the job's events as they happen, until the job is finished.

        Opens a new connection whenever one breaks.  previews: include small preview pictures.
        after: only the events that follow the one with this id.
        """
        following = EventStream(job_id, previews=previews, after=after, retries=self._retries)
        while True:
            try:
                with self._gateway.stream(**following.call().arguments(self._timeout_s)) as answer:
                    if is_stream(answer):
                        for content in answer.iter_bytes():
                            yield from following.read(content)
                            if following.is_over:
                                return
                        pause_s = following.ended()
                    else:
                        answer.read()
                        pause_s = following.refused(answer)
            except httpx.TransportError as error:
                pause_s = following.ended(error)
            time.sleep(pause_s)

    def image(self, job: Job | str, index: int = 0) -> bytes:
        """Return the stored bytes of one image, checked against the digest in the job.

        Raises ImageNotStored and DigestMismatch.
        """
        return self._run(self._flows.image(job, index))

    def download(
        self, job: Job | str, folder: str | Path, names: str = "{job}-{index}"
    ) -> tuple[Path, ...]:
        """Store every image of the job in `folder` and return the paths.

        A file that already holds the right bytes is not fetched again.  names: file names without
        extension, with {job}, {index} and {seed} filled in. Raises DigestMismatch.
        """
        return self._run(self._flows.download(job, Path(folder), names))

    def upload(self, picture: Picture) -> File:
        """Upload a picture, given as bytes or as a path, for jobs to start from.

        The same picture uploaded twice is one file.
        """
        return self._run(self._flows.upload(picture))

    def usage(self) -> Usage:
        """Return what the tenant used, and its limits."""
        return self._run(self._flows.usage())

    def models(self) -> list[dict[str, Any]]:
        """Return every model of the catalog, as the gateway describes it."""
        return self._run(self._flows.list_of("models"))

    def tiers(self) -> list[dict[str, Any]]:
        """Return the tiers, with their limits and defaults."""
        return self._run(self._flows.list_of("tiers"))

    def close(self) -> None:
        """Close the connections."""
        self._gateway.close()
        self._store.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, flow: Flow[Result]) -> Result:
        try:
            step = next(flow)
            while True:
                try:
                    came = self._do(step)
                except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(came)
        except StopIteration as end:
            answer: Result = end.value
            return answer

    def _do(self, step: Step) -> Any:
        match step:
            case Fetch(url):
                return self._store.get(url)
            case Pause(seconds):
                return time.sleep(seconds)
            case DiskWork(do):
                return do()
            case call:
                return self._gateway.request(**call.arguments(self._timeout_s))
