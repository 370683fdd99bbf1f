"""News of running jobs, best effort, over the hand-off's Redis: steps and events for the curious, cancels and watchers for the worker,
endings for those who wait.

Nothing here is the truth: a lost message costs a stale progress bar, a cancel that takes effect at the next lease
renewal, or a waiting client that looks again by itself.
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

CANCELS, ENDINGS, WATCHES = "darkroom:cancels", "darkroom:endings", "darkroom:watches"
_FLUSH_S = 0.1
FLUSH_WITHIN_S = 0.2
_KEEP_S = 600
_WATCHED_FOR_S = 30  # followers say every few seconds that they still look
_MOST_REMEMBERED = 256  # images


@dataclass(frozen=True)
class Step:
    """Where one image of a job stands."""

    index: int
    step: int
    num_steps: int


@dataclass(frozen=True)
class Preview:
    """What one image of a job looks like by now, as a JPEG."""

    index: int
    step: int
    num_steps: int
    jpeg: bytes


@dataclass
class _Noted:
    """What is to be sent; of steps and previews the newest of each image."""

    started: list[tuple[str, int]] = field(default_factory=list)
    steps: dict[tuple[str, int], Step] = field(default_factory=dict)
    previews: dict[tuple[str, int], Preview] = field(default_factory=dict)

    def jobs(self) -> set[str]:
        return {job_id for job_id, _ in (*self.started, *self.steps, *self.previews)}


class ProgressWriter:
    """The worker's side: the engine's thread notes what happens, a thread of its own sends it ten times a second.

    fill: how full the hand-off is; where it is half full, previews are dropped, for what is rendered needs the room more.
    """

    def __init__(self, handoff_url: str, *, fill: Callable[[], float] = lambda: 0.0) -> None:
        self._redis = connect(handoff_url)
        self._fill = fill
        self._unwatched: Callable[[uuid.UUID], None] = _ignore
        self._noted = _Noted()
        self._kept: dict[
            tuple[str, int], deque[bytes]
        ] = {}  # which previews of an image are in its job's stream
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._is_due = threading.Event()
        self._sent = threading.Condition(self._lock)
        self._turns_begun, self._turns_ended = 0, 0  # of the sending thread
        self._note_turn = telemetry.loop("progress")
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def begin(self, job_id: uuid.UUID, attempt: int) -> None:
        """An attempt has started. Returns at once."""
        with self._lock:
            self._noted.started.append((str(job_id), attempt))

    def note(self, job_id: uuid.UUID, step: Step) -> None:
        """Returns at once."""
        with self._lock:
            self._noted.steps[str(job_id), step.index] = step

    def show(self, job_id: uuid.UUID, preview: Preview) -> None:
        """Returns at once."""
        with self._lock:
            self._noted.previews[str(job_id), preview.index] = preview

    def is_watched(self, job_id: uuid.UUID) -> bool:
        """Does anybody look at previews of the job?"""
        try:
            return bool(self._redis.exists(_watch_key(job_id)))
        except redis.RedisError:
            return False

    def when_unwatched(self, act: Callable[[uuid.UUID], None]) -> None:
        """Call `act` with every job that still shows previews although nobody looks any more."""
        self._unwatched = act

    def flush(self, within_s: float = FLUSH_WITHIN_S) -> None:
        """Have all that was noted sent now, so that followers are told of it before what happens next.

        Best effort, like the rest: a Redis that hangs is waited for no longer than `within_s`.
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
            noted, self._noted = self._noted, _Noted()
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

    def _send(self, noted: _Noted) -> None:
        pipe = self._redis.pipeline(
            transaction=True
        )  # or who waits for news is woken by the first of these and reads only that
        for job_id, attempt in noted.started:
            eventlog.append(pipe, job_id, eventlog.STARTED, {"attempt": attempt})
        for (job_id, index), step in noted.steps.items():
            pipe.hset(_key(job_id), str(index), f"{step.step}/{step.num_steps}")
            pipe.expire(_key(job_id), _KEEP_S)
            eventlog.append(
                pipe,
                job_id,
                eventlog.STEP,
                {"index": index, "step": step.step, "num_steps": step.num_steps},
            )
        for job_id in noted.jobs():
            eventlog.keep(pipe, job_id)
        pipe.execute()

    def _send_previews(self, previews: Mapping[tuple[str, int], Preview]) -> None:
        """Each takes the place of one before it, for pictures are large."""
        if self._fill() > admission.HANDOFF_FULL_FOR_PREVIEWS:
            telemetry.PREVIEWS_DROPPED.inc(len(previews))
            for job_id in {job_id for job_id, _ in previews}:
                self._unwatched(
                    uuid.UUID(job_id)
                )  # none is made until a follower says again that he looks
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


class News:
    """The gateway's and the results worker's side: read progress, tell of cancels, stored images and endings."""

    def __init__(self, handoff_url: str) -> None:
        self._redis = connect(handoff_url)

    def steps(self, job_id: uuid.UUID) -> list[Step]:
        """The newest step of every image that was heard of; empty if nothing is known."""
        try:
            known = self._redis.hgetall(_key(str(job_id)))
        except redis.RedisError:
            return []
        return [
            Step(int(index), *map(int, value.decode().split("/")))
            for index, value in sorted(known.items())
        ]

    def forget(self, job_id: uuid.UUID) -> None:
        """Drop what is known of the job's progress, and the record of its events, in which there may be previews.

        Its time runs out by itself if this fails.
        """
        try:
            self._redis.delete(_key(str(job_id)), eventlog.key(job_id))
        except redis.RedisError as error:
            log.info("progress_not_forgotten", job_id=str(job_id), reason=type(error).__name__)

    def tell_cancel(self, job_id: uuid.UUID) -> None:
        """Ask whichever worker runs the job to stop at its next step."""
        self._send("cancel", lambda pipe: _publish(pipe, CANCELS, job_id))

    def tell_ending(self, job_id: uuid.UUID) -> None:
        """Wake those who wait for the job; the record of its events is of little use from now on."""

        def write(pipe: Pipeline) -> None:
            eventlog.keep_ended(pipe, job_id)
            _publish(pipe, ENDINGS, job_id)

        self._send("ending", write)

    def tell_stored(self, job_id: uuid.UUID, image: Mapping[str, Any]) -> None:
        """Record that an image is stored. image: what followers are told of it."""

        def write(pipe: Pipeline) -> None:
            eventlog.append(pipe, job_id, eventlog.STORED, image)
            eventlog.keep(pipe, job_id)

        self._send("stored", write)

    def tell_watching(self, job_ids: Collection[uuid.UUID]) -> None:
        """Ask for previews of the jobs for the next half minute, from whichever workers run them, or will."""

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
            log.info("news_not_sent", what=what, reason=type(error).__name__)


class Listener:
    """A thread that hands every job id heard on `channel` to `hear`, and reconnects for ever."""

    def __init__(self, handoff_url: str, channel: str, hear: Callable[[uuid.UUID], None]) -> None:
        self._url, self._channel, self._hear = handoff_url, channel, hear
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
                        self._dispatch(pubsub.get_message(timeout=1.0))
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
            log.warning("news_not_understood", channel=self._channel)
            return
        try:
            self._hear(job_id)
        except Exception as error:  # one bad ending must not make us deaf to all others
            log.error("news_not_handled", channel=self._channel, job_id=str(job_id), exc_info=error)


LOOK_EVERY_S = 2.0
_GIVES_UP_WITHIN_S = 0.5


class Endings:
    """Lets many threads wait for jobs to end, over one subscription per process."""

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
        """Return when `is_over()`, asked at first, at the job's ending and every 2 s for lost news, or after `timeout_s`.

        gives_up: whether it is not to be waited for any longer; asked twice a second, so it must cost nothing.
        """
        deadline = time.monotonic() + timeout_s
        event = self._enter(job_id)
        try:
            while not is_over() and (left_s := deadline - time.monotonic()) > 0:
                is_heard = _heard(event, min(left_s, LOOK_EVERY_S), gives_up)
                if gives_up():
                    return
                if is_heard and not is_over():
                    time.sleep(0.05)  # heard, but not seen in the database yet
        finally:
            self._leave(job_id)

    def close(self) -> None:
        """Stop listening; who still waits looks again by itself."""
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


def _heard(event: threading.Event, within_s: float, gives_up: Callable[[], bool]) -> bool:
    """Whether it was set within that time, or before `gives_up()`."""
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
    """For what may be lost: nobody waits long for it."""
    return connections.connect(url, socket_timeout=5, health_check_interval=15)


def _key(job_id: str) -> str:
    return f"progress:{job_id}"


def _watch_key(job_id: object) -> str:
    return f"watch:{job_id}"


def _ignore(job_id: uuid.UUID) -> None:
    """Nobody is to be told."""
