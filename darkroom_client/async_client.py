"""The client for asyncio. What it says and in which order is in flows.py; this module does it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
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


class AsyncClient:
    """Use Darkroom from programs that run on asyncio. Close the client when done.

    The methods are those of `Client`, to be awaited; `jobs` and `events` are for `async for`.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = 30.0,
        retries: Retries = Retries(),
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        address = GatewayAddress.resolved(url, api_key)
        self._flows = Flows(address.url, retries)
        self._retries = retries
        self._timeout_s = timeout_s
        self._gateway = httpx.AsyncClient(
            base_url=address.url, headers=address.headers, transport=transport, **address.options
        )
        self._store = httpx.AsyncClient(
            transport=transport, **address.options, timeout=2 * timeout_s
        )

    async def create_job(
        self, prompt: str, *, idempotency_key: str | None = None, **fields: Unpack[JobFields]
    ) -> Job:
        """Do as `Client.create_job`."""
        return await self._run(self._flows.create_job(prompt, fields, idempotency_key))

    async def create_jobs(
        self, jobs: Sequence[Mapping[str, Any]], *, idempotency_key: str | None = None
    ) -> tuple[Submission, ...]:
        """Do as `Client.create_jobs`."""
        return await self._run(self._flows.create_jobs(jobs, idempotency_key))

    async def estimate(self, prompt: str, **fields: Unpack[JobFields]) -> Estimate:
        """Do as `Client.estimate`."""
        return await self._run(self._flows.estimate(prompt, fields))

    async def replay(self, job_id: str, *, idempotency_key: str | None = None) -> Job:
        """Do as `Client.replay`."""
        return await self._run(self._flows.replay(job_id, idempotency_key))

    async def job(self, job_id: str, wait_s: int | None = None) -> Job:
        """Do as `Client.job`."""
        return await self._run(self._flows.job(job_id, wait_s))

    async def status(self, job_id: str) -> Status:
        """Do as `Client.status`."""
        return await self._run(self._flows.status(job_id))

    async def jobs(
        self,
        *,
        state: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
        page_size: int = 50,
    ) -> AsyncIterator[Job]:
        """Do as `Client.jobs`."""
        cursor = None
        while True:
            filters = {
                "state": state,
                "since": since,
                "until": until,
                "metadata": metadata,
                "limit": page_size,
            }
            page = await self._run(self._flows.page(**filters, cursor=cursor))
            for job in page.jobs:
                yield job
            if page.next_cursor is None:
                return
            cursor = page.next_cursor

    async def cancel(self, job_id: str) -> Job:
        """Do as `Client.cancel`."""
        return await self._run(self._flows.cancel(job_id))

    async def delete(self, job_id: str) -> None:
        """Do as `Client.delete`."""
        await self._run(self._flows.delete(job_id))

    async def wait(
        self, job_id: str, timeout_s: float = 300, on_progress: Callable[[Job], None] | None = None
    ) -> Job:
        """Do as `Client.wait`."""
        return await self._run(self._flows.wait(job_id, timeout_s, on_progress))

    async def events(
        self, job_id: str, *, previews: bool = False, after: str | None = None
    ) -> AsyncIterator[Event]:
        """Do as `Client.events`."""
        following = EventStream(job_id, previews=previews, after=after, retries=self._retries)
        while True:
            try:
                async with self._gateway.stream(
                    **following.call().arguments(self._timeout_s)
                ) as answer:
                    if is_stream(answer):
                        async for content in answer.aiter_bytes():
                            for event in following.read(content):
                                yield event
                            if following.is_over:
                                return
                        pause_s = following.ended()
                    else:
                        await answer.aread()
                        pause_s = following.refused(answer)
            except httpx.TransportError as error:
                pause_s = following.ended(error)
            await asyncio.sleep(pause_s)

    async def image(self, job: Job | str, index: int = 0) -> bytes:
        """Do as `Client.image`."""
        return await self._run(self._flows.image(job, index))

    async def download(
        self, job: Job | str, folder: str | Path, names: str = "{job}-{index}"
    ) -> tuple[Path, ...]:
        """Do as `Client.download`."""
        return await self._run(self._flows.download(job, Path(folder), names))

    async def upload(self, picture: Picture) -> File:
        """Do as `Client.upload`."""
        return await self._run(self._flows.upload(picture))

    async def usage(self) -> Usage:
        """Do as `Client.usage`."""
        return await self._run(self._flows.usage())

    async def models(self) -> list[dict[str, Any]]:
        """Do as `Client.models`."""
        return await self._run(self._flows.list_of("models"))

    async def tiers(self) -> list[dict[str, Any]]:
        """Do as `Client.tiers`."""
        return await self._run(self._flows.list_of("tiers"))

    async def close(self) -> None:
        """Close the connections."""
        await self._gateway.aclose()
        await self._store.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _run(self, flow: Flow[Result]) -> Result:
        try:
            step = next(flow)
            while True:
                try:
                    came = await self._do(step)
                except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(came)
        except StopIteration as end:
            answer: Result = end.value
            return answer

    async def _do(self, step: Step) -> Any:
        match step:
            case Fetch(url):
                return await self._store.get(url)
            case Pause(seconds):
                return await asyncio.sleep(seconds)
            case DiskWork(do):
                return await asyncio.to_thread(do)
            case call:
                return await self._gateway.request(**call.arguments(self._timeout_s))
