"""Send signals about running jobs, best effort, over the hand-off's Redis.

Steps and events for followers, cancels and watched jobs for the worker, endings for those who wait.
The rows in Postgres decide. A lost message costs a stale progress bar, a cancel that takes effect
only at the next lease renewal, or a waiting client that has to look again by itself.
"""

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import redis
import structlog
from redis.client import Pipeline

from edges import connections, eventlog, telemetry
from policy import admission

log = structlog.get_logger(__name__)

CANCELS = "darkroom:cancels"
ENDINGS = "darkroom:endings"
WATCHES = "darkroom:watches"
_FLUSH_S = 0.1
FLUSH_WITHIN_S = 0.2
_KEEP_S = 600
_WATCHED_FOR_S = 30  # followers renew it every few seconds
_MOST_REMEMBERED = 256  # images
_LISTENERS_LOOK_EVERY_S = 0.2  # whether they are closed: a process that stops waits for them


@dataclass(frozen=True)
class Step:
    """Say which step one image of a job has reached."""

    index: int
    step: int
    num_steps: int


@dataclass(frozen=True)
class Preview:
    """Hold what one image of a job looks like at a step, as a JPEG."""

    index: int
    step: int
    num_steps: int
    jpeg: bytes


@dataclass
class _PendingProgress:
    """Collect what is to be sent; of steps and previews only the newest of each image."""

    started: list[tuple[str, int]] = field(default_factory=list)
    steps: dict[tuple[str, int], Step] = field(default_factory=dict)
    previews: dict[tuple[str, int], Preview] = field(default_factory=dict)

    def jobs(self) -> set[str]:
        return {job_id for job_id, _ in (*self.started, *self.steps, *self.previews)}


class ProgressWriter:
    """Send a worker's steps, previews and starts: noted by any thread, sent ten times a second.

    fill: how full the hand-off is. From half full on, previews are dropped to leave the room for
    rendered images.
    """

    def __init__(self, handoff_url: str, *, fill: Callable[[], float] = lambda: 0.0) -> None:
        self._redis = connect(handoff_url)
        self._fill = fill
        self._unwatched: Callable[[uuid.UUID], None] = _ignore
        self._noted = _PendingProgress()
        # The event ids of the previews of each image that are in its job's stream.
        self._kept: dict[tuple[str, int], deque[bytes]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._is_due = threading.Event()
        self._sent = threading.Condition(self._lock)
        # Of the sending thread:
        self._turns_begun = 0
        self._turns_ended = 0
        self._note_turn = telemetry.loop("progress")
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def begin(self, job_id: uuid.UUID, attempt: int) -> None:
        """Note that an attempt has started. Returns at once."""
        with self._lock:
            self._noted.started.append((str(job_id), attempt))

    def note(self, job_id: uuid.UUID, step: Step) -> None:
        """Note an image's step. Returns at once."""
        with self._lock:
            self._noted.steps[str(job_id), step.index] = step

    def show(self, job_id: uuid.UUID, preview: Preview) -> None:
        """Note an image's preview. Returns at once."""
        with self._lock:
            self._noted.previews[str(job_id), preview.index] = preview

    def is_watched(self, job_id: uuid.UUID) -> bool:
        """Tell whether anybody looks at previews of the job; False if Redis does not answer."""
        try:
            return bool(self._redis.exists(_watch_key(job_id)))
        except redis.RedisError:
            return False

    def when_unwatched(self, act: Callable[[uuid.UUID], None]) -> None:
        """Set `act`, to be called with every job that sends previews which nobody looks at."""
        self._unwatched = act

    def flush(self, within_s: float = FLUSH_WITHIN_S) -> None:
        """Send all that was noted now, so that followers get it before what happens next.

        Best effort: waits for a Redis that hangs no longer than `within_s`.
        """
        with self._sent:
            next_turn = self._turns_begun + 1
            self._is_due.set()
            self._sent.wait_for(lambda: self._turns_ended >= next_turn, timeout=within_s)

    def close(self) -> None:
        self._stop.set()
        self._is_due.set()
        self._thread.join(timeout=2)
        telemetry.end_loop("progress")

    def _run(self) -> None:
        while not self._stop.is_set():
            self._is_due.wait(_FLUSH_S)
            self._is_due.clear()
            self._note_turn()
            self._send_noted()

    def _send_noted(self) -> None:
        with self._lock:
            noted, self._noted = self._noted, _PendingProgress()
            self._turns_begun += 1
        try:
            if noted.jobs():
                self._send(noted)
            if noted.previews:
                self._send_previews(noted.previews)
        except redis.RedisError as error:
            log.info("progress_not_sent", reason=type(error).__name__)
        finally:
            with self._sent:
                self._turns_ended = self._turns_begun
                self._sent.notify_all()

    def _send(self, noted: _PendingProgress) -> None:
        # A transaction: otherwise the first event would wake a blocked reader, which would then
        # read that one alone.
        pipe = self._redis.pipeline(transaction=True)
        for job_id, attempt in noted.started:
            eventlog.append(pipe, job_id, eventlog.STARTED, {"attempt": attempt})
        for (job_id, index), step in noted.steps.items():
            pipe.hset(_key(job_id), str(index), f"{step.step}/{step.num_steps}")
            pipe.expire(_key(job_id), _KEEP_S)
            data = {"index": index, "step": step.step, "num_steps": step.num_steps}
            eventlog.append(pipe, job_id, eventlog.STEP, data)
        for job_id in noted.jobs():
            eventlog.keep(pipe, job_id)
        pipe.execute()

    def _send_previews(self, previews: Mapping[tuple[str, int], Preview]) -> None:
        """Send the previews; each replaces an older one of its image, for pictures are large."""
        if self._fill() > admission.HANDOFF_FULL_FOR_PREVIEWS:
            telemetry.PREVIEWS_DROPPED.inc(len(previews))
            # No previews of these jobs are made until a follower asks again.
            for job_id in {job_id for job_id, _ in previews}:
                self._unwatched(uuid.UUID(job_id))
            return
        for (job_id, index), preview in previews.items():
            kept = self._kept.setdefault((job_id, index), deque())
            pipe = self._redis.pipeline(transaction=False)
            data = {"index": index, "step": preview.step, "num_steps": preview.num_steps}
            eventlog.append(pipe, job_id, eventlog.PREVIEW, data, preview.jpeg)
            pipe.exists(_watch_key(job_id))
            if len(kept) >= eventlog.KEPT_PREVIEWS:
                pipe.xdel(eventlog.key(job_id), kept.popleft())
            event_id, is_watched, *_ = pipe.execute()
            kept.append(event_id)
            if not is_watched:
                self._unwatched(uuid.UUID(job_id))
        while len(self._kept) > _MOST_REMEMBERED:
            del self._kept[next(iter(self._kept))]


class JobSignals:
    """Read progress; publish cancels, stored images, endings and watched jobs.

    Used by the gateway and the results worker.
    """

    def __init__(self, handoff_url: str) -> None:
        self._redis = connect(handoff_url)

    def steps(self, job_id: uuid.UUID) -> list[Step]:
        """Return the newest known step of each image; empty if nothing is known."""
        try:
            known = connections.hgetall(self._redis, _key(str(job_id)))
        except redis.RedisError:
            return []
        return [
            Step(int(index), *map(int, value.decode().split("/")))
            for index, value in sorted(known.items())
        ]

    def forget(self, job_id: uuid.UUID) -> None:
        """Delete the job's progress, and its events, which may hold previews.

        Both expire by themselves if this fails.
        """
        try:
            self._redis.delete(_key(str(job_id)), eventlog.key(job_id))
        except redis.RedisError as error:
            log.info("progress_not_forgotten", job_id=str(job_id), reason=type(error).__name__)

    def publish_cancel(self, job_id: uuid.UUID) -> None:
        """Ask whichever worker runs the job to stop at its next step."""
        self._send("cancel", lambda pipe: _publish(pipe, CANCELS, job_id))

    def publish_ending(self, job_id: uuid.UUID) -> None:
        """Publish that the job has ended, which wakes those who wait; its events expire soon."""

        def write(pipe: Pipeline) -> None:
            eventlog.keep_ended(pipe, job_id)
            _publish(pipe, ENDINGS, job_id)

        self._send("ending", write)

    def publish_stored(self, job_id: uuid.UUID, image: Mapping[str, Any]) -> None:
        """Append to the job's events that an image is stored. image: the event's data."""

        def write(pipe: Pipeline) -> None:
            eventlog.append(pipe, job_id, eventlog.STORED, image)
            eventlog.keep(pipe, job_id)

        self._send("stored", write)

    def publish_watched(self, job_ids: Collection[uuid.UUID]) -> None:
        """Ask the workers that run or will run these jobs for previews, for half a minute."""

        def write(pipe: Pipeline) -> None:
            for job_id in job_ids:
                pipe.set(_watch_key(job_id), 1, ex=_WATCHED_FOR_S)
                _publish(pipe, WATCHES, job_id)

        self._send("watching", write)

    def _send(self, what: str, write: Callable[[Pipeline], None]) -> None:
        pipe = self._redis.pipeline(transaction=False)
        write(pipe)
        try:
            pipe.execute()
        except redis.RedisError as error:
            log.info("signal_not_sent", what=what, reason=type(error).__name__)


class Listener:
    """Call `hear` with every job id published on `channel`; its thread reconnects for ever."""

    def __init__(self, handoff_url: str, channel: str, hear: Callable[[uuid.UUID], None]) -> None:
        self._url = handoff_url
        self._channel = channel
        self._hear = hear
        self._stop = threading.Event()
        self._loop = channel.removeprefix("darkroom:")
        self._note_turn = telemetry.loop(self._loop)
        self._thread = threading.Thread(target=self._run, name=f"listen-{channel}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=3)
        telemetry.end_loop(self._loop)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with (
                    connect(self._url) as client,
                    client.pubsub(ignore_subscribe_messages=True) as pubsub,
                ):
                    pubsub.subscribe(self._channel)
                    while not self._stop.is_set():
                        self._note_turn()
                        self._dispatch(pubsub.get_message(timeout=_LISTENERS_LOOK_EVERY_S))
            except redis.RedisError as error:
                log.info("listener_reconnects", channel=self._channel, reason=type(error).__name__)
                self._note_turn()
                self._stop.wait(0.5)

    def _dispatch(self, message: dict[str, Any] | None) -> None:
        if message is None:
            return
        try:
            job_id = uuid.UUID(str(json.loads(message["data"])["job_id"]))
        except (ValueError, KeyError, TypeError):
            log.warning("signal_not_understood", channel=self._channel)
            return
        try:
            self._hear(job_id)
        except Exception as error:  # one bad ending must not make us deaf to all others
            log.error(
                "signal_not_handled", channel=self._channel, job_id=str(job_id), exc_info=error
            )


LOOK_EVERY_S = 2.0
_GIVES_UP_WITHIN_S = 0.5


class Endings:
    """Let many threads wait for jobs to end, over one subscription per process."""

    def __init__(self, handoff_url: str) -> None:
        self._waiting: dict[uuid.UUID, tuple[threading.Event, int]] = {}
        self._lock = threading.Lock()
        self._listener = Listener(handoff_url, ENDINGS, self._hear)

    def wait(
        self,
        job_id: uuid.UUID,
        timeout_s: float,
        is_over: Callable[[], bool],
        gives_up: Callable[[], bool] = lambda: False,
    ) -> None:
        """Return when `is_over()`, when `gives_up()`, or after `timeout_s`.

        is_over: called first, when the job's ending is published, and every 2 s in case that
        message was lost.
        gives_up: called twice a second, so it must be cheap.
        """
        deadline = time.monotonic() + timeout_s
        event = self._enter(job_id)
        try:
            while not is_over() and (left_s := deadline - time.monotonic()) > 0:
                is_heard = _wait_for_event(event, min(left_s, LOOK_EVERY_S), gives_up)
                if gives_up():
                    return
                if is_heard and not is_over():
                    time.sleep(0.05)  # heard, but not seen in the database yet
        finally:
            self._leave(job_id)

    def close(self) -> None:
        """Stop listening; those who still wait call `is_over` by themselves."""
        self._listener.close()

    def _hear(self, job_id: uuid.UUID) -> None:
        with self._lock:
            if job_id in self._waiting:
                self._waiting[job_id][0].set()

    def _enter(self, job_id: uuid.UUID) -> threading.Event:
        with self._lock:
            event, count = self._waiting.get(job_id, (threading.Event(), 0))
            self._waiting[job_id] = event, count + 1
            return event

    def _leave(self, job_id: uuid.UUID) -> None:
        with self._lock:
            event, count = self._waiting[job_id]
            if count > 1:
                self._waiting[job_id] = event, count - 1
            else:
                del self._waiting[job_id]


def _wait_for_event(event: threading.Event, within_s: float, gives_up: Callable[[], bool]) -> bool:
    """Tell whether the event was set within that time, and before `gives_up()`."""
    deadline = time.monotonic() + within_s
    while (left_s := deadline - time.monotonic()) > 0:
        if event.wait(min(left_s, _GIVES_UP_WITHIN_S)):
            return True
        if gives_up():
            return False
    return False


def _publish(pipe: Pipeline, channel: str, job_id: uuid.UUID) -> None:
    pipe.publish(channel, json.dumps({"job_id": str(job_id)}))


def connect(url: str) -> redis.Redis:
    """Make a client for messages that may be lost: its timeouts are short."""
    return connections.connect(url, socket_timeout=5, health_check_interval=15)


def _key(job_id: str) -> str:
    return f"progress:{job_id}"


def _watch_key(job_id: object) -> str:
    return f"watch:{job_id}"


def _ignore(job_id: uuid.UUID) -> None:
    """Do nothing."""
