"""The client that blocks. What it says and reads is in wire.py; this module sends it."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import httpx

from darkroom_client import wire
from darkroom_client.errors import DigestMismatch, ImageNotStored, UnexpectedAnswer, Unreachable, WaitTimeout
from darkroom_client.jobs import Job

_POLL_EVERY_S = 0.15
_LONGEST_HOLD_S = 30  # the gateway would hold an answer for 60 s; proxies on the way may not


class Client:
    """Darkroom at `url`, as the tenant whose key this is. Safe to share among threads; close it when done."""

    def __init__(self, url: str, api_key: str, *, transport: httpx.BaseTransport | None = None) -> None:
        proxied = httpx.URL(url).host not in ("127.0.0.1", "localhost", "::1")  # no proxy leads back to our own machine
        headers = {"Authorization": f"Bearer {api_key}", "Accept": "application/json"}
        self._gateway = httpx.Client(base_url=url, headers=headers, transport=transport, trust_env=proxied)
        self._store = httpx.Client(transport=transport, trust_env=proxied)  # has no key: the presigned URL is the permission

    def create_job(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        model: str | None = None,
        tier: str | None = None,
        size: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        seed: int | None = None,
        n: int | None = None,
        output_format: str | None = None,
    ) -> Job:
        """Ask for images. The job comes back accepted, with every parameter resolved; what is not said is the gateway's to choose."""
        wish = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "model": model,
            "tier": tier,
            "size": size,
            "steps": steps,
            "guidance": guidance,
            "sampler": sampler,
            "seed": seed,
            "n": n,
            "output_format": output_format,
        }
        return wire.read_job(self._send(wire.create_job(wish)))

    def job(self, job_id: str, wait_s: int | None = None) -> Job:
        """The job as it is now. wait_s: as it is when it is finished, or after so many seconds."""
        return wire.read_job(self._send(wire.show_job(job_id, wait_s)))

    def jobs(self, *, state: str | None = None, page_size: int = 50) -> Iterator[Job]:
        """The tenant's jobs, newest first, page after page as they are asked for."""
        cursor = None
        while True:
            page = wire.read_page(self._send(wire.list_jobs(state=state, limit=page_size, cursor=cursor)))
            yield from page.jobs
            if page.next_cursor is None:
                return
            cursor = page.next_cursor

    def cancel(self, job_id: str) -> Job:
        """Cancel the job. ProblemError if it is finished already."""
        return wire.read_job(self._send(wire.cancel_job(job_id)))

    def wait(self, job_id: str, timeout_s: float = 300, on_progress: Callable[[Job], None] | None = None) -> Job:
        """The job when it is finished, however it ended. Raises WaitTimeout.

        on_progress: called with the job several times a second, the last time when it is finished.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            remaining_s = max(0.0, deadline - time.monotonic())
            job = self.job(job_id) if on_progress else self.job(job_id, wait_s=min(_LONGEST_HOLD_S, int(remaining_s)))
            if on_progress:
                on_progress(job)
            if job.is_finished:
                return job
            if remaining_s <= 0:
                raise WaitTimeout(f"job {job_id} is still {job.state} after {timeout_s:g} s", job)
            time.sleep(min(_POLL_EVERY_S, remaining_s))

    def image(self, job: Job | str, index: int = 0) -> bytes:
        """The stored bytes of one image, checked against the digest that the job tells. Raises ImageNotStored, DigestMismatch."""
        known = self.job(job) if isinstance(job, str) else job
        expected = next((image.content_sha256 for image in known.images if image.index == index), None)
        if expected is None:
            raise ImageNotStored(f"job {known.id} is {known.state} and has no stored image {index}")
        location = wire.read_location(self._send(wire.show_image(known.id, index)))
        with _reaching(location):
            answer = self._store.get(location, timeout=60)
        if not answer.is_success:
            raise UnexpectedAnswer(f"the object store answered {answer.status_code} for image {index} of job {known.id}")
        if hashlib.sha256(answer.content).hexdigest() != expected:
            raise DigestMismatch(f"image {index} of job {known.id}: {len(answer.content)} bytes came that are not the stored ones")
        return answer.content

    def models(self) -> list[dict[str, Any]]:
        """What can be asked for: every model of the catalog, as the gateway describes it."""
        return list(wire.read_object(self._send(wire.list_of("models")))["data"])

    def tiers(self) -> list[dict[str, Any]]:
        """The classes of service, with their limits and defaults."""
        return list(wire.read_object(self._send(wire.list_of("tiers")))["data"])

    def close(self) -> None:
        """Close the connections."""
        self._gateway.close()
        self._store.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _send(self, call: wire.Call) -> httpx.Response:
        with _reaching(str(self._gateway.base_url)):
            return self._gateway.request(**call.arguments())


@contextlib.contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Turn httpx's errors into Unreachable."""
    try:
        yield
    except (httpx.TransportError, httpx.InvalidURL) as error:
        host = httpx.URL(url).copy_with(query=None) if isinstance(error, httpx.TransportError) else url
        raise Unreachable(f"{host} does not answer: {error or type(error).__name__}") from error
