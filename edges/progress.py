"""News of running jobs, best effort, over the hand-off's Redis: steps for the curious, cancels for the worker, endings for those who wait.

Nothing here is the truth: a lost message costs a stale progress bar, a cancel that takes effect at the next lease
renewal, or a waiting client that looks again by itself.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis
import structlog

log = structlog.get_logger(__name__)

CANCELS, ENDINGS = "darkroom:cancels", "darkroom:endings"
_FLUSH_S = 0.1
_KEEP_S = 600


@dataclass(frozen=True)
class Step:
    """Where one image of a job stands."""

    index: int
    step: int
    num_steps: int


class ProgressWriter:
    """The worker's side: the engine's thread notes steps, a thread of its own sends the newest of each job ten times a second."""

    def __init__(self, handoff_url: str) -> None:
        self._redis = _connect(handoff_url)
        self._newest: dict[tuple[str, int], Step] = {}
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def note(self, job_id: uuid.UUID, step: Step) -> None:
        """Returns at once."""
        with self._lock:
            self._newest[str(job_id), step.index] = step

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        while not self._stop.wait(_FLUSH_S):
            with self._lock:
                newest, self._newest = self._newest, {}
            if newest:
                self._send(newest)

    def _send(self, newest: dict[tuple[str, int], Step]) -> None:
        try:
            pipe = self._redis.pipeline(transaction=False)
            for (job_id, index), step in newest.items():
                pipe.hset(_key(job_id), str(index), f"{step.step}/{step.num_steps}")
                pipe.expire(_key(job_id), _KEEP_S)
            pipe.execute()
        except redis.RedisError as error:
            log.info("progress_not_sent", reason=type(error).__name__)


class News:
    """The gateway's and the results worker's side: read progress, tell of cancels and endings."""

    def __init__(self, handoff_url: str) -> None:
        self._redis = _connect(handoff_url)

    def steps(self, job_id: uuid.UUID) -> list[Step]:
        """The newest step of every image that was heard of; empty if nothing is known."""
        try:
            known = self._redis.hgetall(_key(str(job_id)))
        except redis.RedisError:
            return []
        return [Step(int(index), *map(int, value.decode().split("/"))) for index, value in sorted(known.items())]

    def forget(self, job_id: uuid.UUID) -> None:
        """Drop what is known of the job's progress; its time runs out by itself if this fails."""
        try:
            self._redis.delete(_key(str(job_id)))
        except redis.RedisError as error:
            log.info("progress_not_forgotten", job_id=str(job_id), reason=type(error).__name__)

    def tell_cancel(self, job_id: uuid.UUID) -> None:
        """Ask whichever worker runs the job to stop at its next step."""
        self._tell(CANCELS, job_id)

    def tell_ending(self, job_id: uuid.UUID) -> None:
        """Wake those who wait for the job."""
        self._tell(ENDINGS, job_id)

    def _tell(self, channel: str, job_id: uuid.UUID) -> None:
        try:
            self._redis.publish(channel, json.dumps({"job_id": str(job_id)}))
        except redis.RedisError as error:
            log.info("news_not_sent", channel=channel, job_id=str(job_id), reason=type(error).__name__)


class Listener:
    """A thread that hands every job id heard on `channel` to `hear`, and reconnects for ever."""

    def __init__(self, handoff_url: str, channel: str, hear: Callable[[uuid.UUID], None]) -> None:
        self._url, self._channel, self._hear = handoff_url, channel, hear
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"listen-{channel}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=3)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with _connect(self._url) as client, client.pubsub(ignore_subscribe_messages=True) as pubsub:
                    pubsub.subscribe(self._channel)
                    while not self._stop.is_set():
                        self._dispatch(pubsub.get_message(timeout=1.0))
            except redis.RedisError as error:
                log.info("listener_reconnects", channel=self._channel, reason=type(error).__name__)
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


class Endings:
    """Lets many threads wait for jobs to end, over one subscription per process."""

    def __init__(self, handoff_url: str) -> None:
        self._waiting: dict[uuid.UUID, tuple[threading.Event, int]] = {}
        self._lock = threading.Lock()
        self._listener = Listener(handoff_url, ENDINGS, self._hear)

    def wait(self, job_id: uuid.UUID, timeout_s: float, is_over: Callable[[], bool]) -> None:
        """Return when `is_over()`, asked at first, at the job's ending and every 2 s for lost news, or after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        event = self._enter(job_id)
        try:
            while not is_over() and (left_s := deadline - time.monotonic()) > 0:
                if event.wait(min(left_s, 2.0)) and not is_over():
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


def _connect(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=2, health_check_interval=15)


def _key(job_id: str) -> str:
    return f"progress:{job_id}"
