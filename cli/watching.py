"""Follow a job and show its progress: a bar on a terminal, a line per change in a file."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cli import screen
from darkroom_client import Client, Event, Job, ProblemError


@dataclass
class WatchedJob:
    """Hold the progress of a job under way, as its events report it."""

    state: str
    steps_to_do: int
    num_images: int
    steps: dict[int, int]  # done, by image
    images_stored: int = 0
    jobs_ahead: int | None = None
    eta_s: float | None = None

    @classmethod
    def of(cls, job: Job) -> "WatchedJob":
        """Build it from the API's job."""
        watched_job = cls(job.state, job.steps * job.n, job.n, {})
        if job.progress:  # before there is any, a picture to start from may spare some of the steps
            watched_job.steps_to_do = job.progress.num_steps
            watched_job.steps = {0: job.progress.step}
            watched_job.images_stored = job.progress.images_done
        if job.queue:
            watched_job.jobs_ahead = job.queue.jobs_ahead
            watched_job.eta_s = job.queue.eta_p50_s
        if job.state == "succeeded":
            watched_job.steps = {0: watched_job.steps_to_do}
        return watched_job

    def hear(self, event: Event) -> None:
        """Apply an event."""
        index = int(event.data.get("index", 0))
        if event.kind == "queued":
            self.state = "queued"
            self.jobs_ahead = event.data.get("jobs_ahead")
            self.eta_s = event.data.get("eta_p50_s")
        elif event.kind == "started":
            self.state, self.jobs_ahead = "running", None
        elif event.kind == "step":
            self.state = "running"
            steps_to_do = int(event.data.get("num_steps", 0)) * self.num_images
            self.steps_to_do = steps_to_do or self.steps_to_do
            self.steps[index] = max(self.steps.get(index, 0), int(event.data.get("step", 0)))
        elif event.kind == "stored":
            self.images_stored += 1
            self.steps[index] = self.steps_to_do // self.num_images
            self.state = "storing" if self.done >= self.steps_to_do else "running"
        elif event.kind == "final":
            self.state = str(event.data.get("state", "finished"))

    @property
    def done(self) -> int:
        """Return the finished denoise steps of all images."""
        return min(sum(self.steps.values()), self.steps_to_do)

    @property
    def words(self) -> str:
        """Describe the job's progress in words."""
        if self.state == "queued":
            ahead = "" if not self.jobs_ahead else f" · {self.jobs_ahead} ahead"
            return f"queued{ahead}" + (
                f" · about {self.eta_s:.0f} s" if self.eta_s is not None else ""
            )
        if self.state == "running":
            images = (
                f" · {self.images_stored} of {self.num_images} images stored"
                if self.num_images > 1
                else ""
            )
            return f"step {self.done}/{self.steps_to_do}{images}"
        return self.state


def watch(client: Client, job: Job, *, timeout_s: float | None, cancels: bool) -> Job:
    """Wait for a job and show its progress; without a time limit, follow its events.

    cancels: Ctrl-C, which is raised again, cancels the job first. Raises WaitTimeout.
    """
    try:
        return _watch(client, job, timeout_s)
    except KeyboardInterrupt:
        what = f"is {client.cancel(job.id).state}" if cancels else "goes on"
        screen.err().print(f"job {job.id} {what}", soft_wrap=True)
        raise


def _watch(client: Client, job: Job, timeout_s: float | None) -> Job:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[where]}"),
        TimeElapsedColumn(),
    )
    console = screen.err()
    said = ""
    watched_job = WatchedJob.of(job)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task(
            job.id[-8:], total=watched_job.steps_to_do + 1, where=watched_job.words
        )

        def show(seen: WatchedJob) -> None:
            nonlocal said
            done = seen.done + (seen.state == "succeeded")
            progress.update(bar, completed=done, total=seen.steps_to_do + 1, where=seen.words)
            if not console.is_terminal and seen.state != said:
                said = seen.state
                console.print(f"job {job.id} is {seen.state}", soft_wrap=True)

        if timeout_s is None:
            return follow(client, job, show)
        return client.wait(job.id, timeout_s, on_progress=lambda seen: show(WatchedJob.of(seen)))


def follow(client: Client, job: Job, show: Callable[[WatchedJob], None]) -> Job:
    """Return the job when it is finished: follow its events, or poll where there are none."""
    if job.is_finished:
        return job
    watched_job = WatchedJob.of(job)
    try:
        for event in client.events(job.id):
            watched_job.hear(event)
            show(watched_job)
    except ProblemError as refusal:
        if not has_no_events(refusal):
            raise
    return client.wait(job.id, math.inf, on_progress=lambda seen: show(WatchedJob.of(seen)))


def has_no_events(refusal: ProblemError) -> bool:
    """Tell whether the gateway is too old for events, or has no stream left."""
    return refusal.slug in ("not-found", "streams-exhausted")
