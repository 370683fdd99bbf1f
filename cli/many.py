"""Submit, follow and download the jobs of many prompts, a few at a time.

After any interruption a second run continues where the first one stopped.
"""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cli import screen
from cli.board import Board
from cli.prompts import PromptLine
from cli.runs import Run
from cli.watching import WatchedJob, has_no_events
from darkroom_client import AsyncClient, DigestMismatch, Job, ProblemError, Unreachable, downloads

_AWAY_FOR_S = 120.0  # the run ends if the gateway is unreachable for longer
_LOOK_EVERY_S = 5.0
_SECOND_CTRL_C_S = 2.0
_LAST_ANSWERS_S = 5.0


class Interrupted(Exception):
    """Report Ctrl-C, after the run was saved."""


class PromptRunner:
    """Work through the lines of one run."""

    def __init__(
        self,
        client: AsyncClient,
        run: Run,
        lines: Sequence[PromptLine],
        fields: Mapping[str, Any],
        folder: Path,
        board: Board,
        *,
        retry_failed: bool,
    ) -> None:
        self._client = client
        self._run = run
        self._lines = lines
        self._fields = fields
        self._folder = folder
        self._board = board
        self._retry_failed = retry_failed
        self._submitting: set[asyncio.Task[Job]] = set()
        self._under_way: dict[int, str] = {}
        self.failed: list[tuple[PromptLine, str]] = []
        self.warned: list[tuple[PromptLine, str]] = []
        self.num_images = 0
        self.num_new = 0

    async def go(self, parallel: int, *, cancels: bool) -> None:
        """Work until all lines are done. Raises Interrupted, and errors that no retry can cure."""
        interrupts: asyncio.Queue[None] = asyncio.Queue()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupts.put_nowait, None)
        left = iter(self._lines)
        workers = [
            asyncio.create_task(self._work(left)) for _ in range(min(parallel, len(self._lines)))
        ]
        interrupt = asyncio.create_task(interrupts.get())
        try:
            everything = asyncio.gather(*workers)
            either: list[asyncio.Future[list[None]] | asyncio.Future[None]] = [
                everything,
                interrupt,
            ]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if everything.done():
                everything.result()
                return
            await self._stop(workers)
            await self._leave(interrupts, cancels=cancels)
            raise Interrupted
        finally:
            interrupt.cancel()
            await self._stop(workers)
            self._run.save()

    async def _stop(self, workers: Sequence[asyncio.Task[None]]) -> None:
        """Cancel the workers, and wait for the answers of requests that may have made jobs."""
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        if self._submitting:
            await asyncio.wait(self._submitting, timeout=_LAST_ANSWERS_S)

    async def _leave(self, interrupts: "asyncio.Queue[None]", *, cancels: bool) -> None:
        """End after Ctrl-C: leave the jobs under way, or cancel them if that is wanted."""
        self._run.save()
        ids = dict(self._under_way)
        if ids and not cancels and screen.err().is_terminal:
            screen.err().print(
                f"{_jobs(len(ids))} under way; "
                f"Ctrl-C again within {_SECOND_CTRL_C_S:.0f} s to cancel"
            )
            try:
                await asyncio.wait_for(interrupts.get(), _SECOND_CTRL_C_S)
                cancels = True
            except TimeoutError:
                pass
        if cancels:
            await asyncio.gather(*(self._cancel(number, job_id) for number, job_id in ids.items()))
        what = f"{_jobs(len(ids))} {'canceled' if cancels else 'left under way'}"
        screen.err().print(
            f"Interrupted; {what}. The same command again goes on from here.", soft_wrap=True
        )

    async def _cancel(self, number: int, job_id: str) -> None:
        try:
            await self._client.cancel(job_id)
            self._run.begin_again(number)
        except ProblemError:
            pass  # it is finished: the next run finds it so

    async def _work(self, lines: Iterator[PromptLine]) -> None:
        for line in lines:
            await self._serve(line)

    async def _serve(self, line: PromptLine) -> None:
        """Turn a line into its image files."""
        try:
            job = await self._job_of(line)
            self._under_way[line.number] = job.id
            if not job.is_finished:
                job = await self._follow(line, job)
            self._run.note(line.number, state=job.state)
            await self._settle(line, job)
        except ProblemError as refusal:
            await self._fail(line, "refused", str(refusal))
        except (FileNotFoundError, DigestMismatch) as error:
            await self._fail(line, "not done", str(error))
        self._under_way.pop(line.number, None)

    async def _settle(self, line: PromptLine, job: Job) -> None:
        names = f"{line.number}-{{seed}}-{{index}}"
        stored = [
            (downloads.path_of(self._folder, job, image, names), image.content_sha256)
            for image in job.images
        ]
        new = sum(
            digest is not None and not downloads.is_there(path, digest) for path, digest in stored
        )
        paths = await self._client.download(job, self._folder, names)
        self.warned += [(line, warning.detail) for warning in job.warnings]
        self.num_images += len(paths)
        self.num_new += new
        if job.state == "succeeded":
            self._board.end(line, job.state, paths=paths, new=new)
        else:
            await self._fail(line, job.state, _why_failed(job))

    async def _fail(self, line: PromptLine, state: str, why: str) -> None:
        self._run.note(line.number, state=state, why=why)
        self.failed.append((line, f"{state}: {why}"))
        self._board.end(line, state, why=why)

    async def _job_of(self, line: PromptLine) -> Job:
        """Return the line's job: the one that it has, or a new one."""
        known = self._run.of(line.number)
        if self._retry_failed and known.get("state") in (
            "failed",
            "rejected",
            "canceled",
            "expired",
        ):
            self._run.begin_again(line.number)
        elif known.get("job"):
            try:
                return await self._patiently(partial(self._client.job, known["job"]))
            except ProblemError as refusal:
                if refusal.slug != "job-not-found":
                    raise
                self._run.begin_again(line.number)
        return await self._patiently(partial(self._submit, line))

    async def _submit(self, line: PromptLine) -> Job:
        """Create the line's job with one request.

        The request outlives a cancellation of this call, because it may already have made a job.
        """
        fields = {**self._fields, **line.fields}
        request = asyncio.create_task(
            self._client.create_job(
                line.prompt, idempotency_key=self._run.key(line.number), **fields
            )
        )
        self._submitting.add(request)
        request.add_done_callback(lambda done: self._answered(line, done))
        return await asyncio.shield(request)

    def _answered(self, line: PromptLine, request: "asyncio.Task[Job]") -> None:
        self._submitting.discard(request)
        if not request.cancelled() and request.exception() is None:
            self._under_way[line.number] = request.result().id
            self._run.note(line.number, job=request.result().id)

    async def _patiently(self, ask: Callable[[], Awaitable[Job]]) -> Job:
        """Return the answer of `ask()`; retry while the queue is full or the gateway is away."""
        away_since = None
        while True:
            try:
                return await ask()
            except ProblemError as refusal:
                if refusal.retry_after_s is None or refusal.status not in (429, 503):
                    raise
                self._board.wait(f"{refusal.title}: trying again in {refusal.retry_after_s:.0f} s")
                pause_s = refusal.retry_after_s
            except Unreachable as error:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > _AWAY_FOR_S:
                    raise
                self._board.wait(str(error))
                pause_s = 1.0
            await asyncio.sleep(pause_s)

    async def _follow(self, line: PromptLine, job: Job) -> Job:
        """Return the job when it is finished; keep its row on the board up to date meanwhile."""
        watched_job = WatchedJob.of(job)
        self._board.show(line, watched_job)
        try:
            async for event in self._client.events(job.id):
                watched_job.hear(event)
                self._board.show(line, watched_job)
        except ProblemError as refusal:
            if not has_no_events(refusal):
                raise
        except Unreachable as error:
            self._board.wait(str(error))
        while not job.is_finished:
            job = await self._patiently(partial(self._client.job, job.id))
            self._board.show(line, WatchedJob.of(job))
            if not job.is_finished:
                await asyncio.sleep(min(_LOOK_EVERY_S, 0.2 * max(1, len(self._under_way))))
        return job


def _jobs(number: int) -> str:
    return f"{number} job{'' if number == 1 else 's'}"


def _why_failed(job: Job) -> str:
    if job.failure is None:
        return f"job {job.id}"
    detail = f" ({job.failure.detail})" if job.failure.detail else ""
    return f"{job.failure.code}{detail}"
