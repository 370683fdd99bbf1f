"""Fan the streams of many jobs out to many followers over one Redis connection per process.

A thread reads the new events of all followed jobs at once and puts them into each follower's queue.
A new follower first reads what happened before, and misses nothing in between. A slow follower
loses steps and previews, nothing else.
"""

import queue
import threading
import time
import uuid
from collections.abc import Collection, Sequence

import redis
import structlog

from edges import connections, eventlog, telemetry
from edges.eventlog import BEGINNING, FINAL, PREVIEW, STEP, JobEvent
from edges.progress import ENDINGS, Listener, connect

log = structlog.get_logger(__name__)

READ_EVERY_S = 0.05  # the events of busy jobs come in batches, 20 a second at most
_BLOCK_MS = 2000
_MAX_UNREAD = 256  # events of a follower, before its steps and previews are dropped
_DROPPABLE = (STEP, PREVIEW)
SHUTDOWN = JobEvent(None, "leave", {})  # this process ends: follow on elsewhere


class TooManySubscribers(Exception):
    """The process has as many followers as it may have; try again later."""


class Subscription:
    """Queue the events of one job for one follower."""

    def __init__(self, job_id: uuid.UUID, *, wants_previews: bool) -> None:
        self.job_id = job_id
        self.wants_previews = wants_previews
        self.seen = (0, 0)
        self._unread: queue.SimpleQueue[JobEvent] = queue.SimpleQueue()

    def put(self, event: JobEvent) -> None:
        """Queue the event for the follower; never wait. Steps and previews may be dropped."""
        if event.kind == PREVIEW and not self.wants_previews:
            return
        if event.kind in _DROPPABLE and self._unread.qsize() >= _MAX_UNREAD:
            telemetry.EVENTS_DROPPED.labels(event.kind).inc()
            return
        self._unread.put(event)

    def get(self, within_s: float) -> JobEvent | None:
        """Return the next event that is new to the follower; None if none comes in time.

        An event of the job's stream, FINAL when the job has ended, or SHUTDOWN.
        """
        deadline = time.monotonic() + within_s
        while True:
            try:
                event = self._unread.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if self.is_new(event):
                return event

    def is_new(self, event: JobEvent) -> bool:
        """Tell whether the event is new to the follower, and remember it as seen."""
        if event.id is None:
            return True
        if (place := eventlog.order(event.id)) <= self.seen:
            return False
        self.seen = place
        return True


class EventFanout:
    """Read the streams for all followers of a process; the threads start with the first one."""

    def __init__(self, handoff_url: str, *, most: int) -> None:
        self._url = handoff_url
        self._max_subscriptions = most
        self._redis = connect(handoff_url)
        self._wake_key = f"events:wake:{uuid.uuid4()}"
        self._wake_id = BEGINNING
        self._subscriptions: dict[uuid.UUID, list[Subscription]] = {}
        self._positions: dict[uuid.UUID, str] = {}  # what has been read of each followed job
        self._all_subscriptions: set[Subscription] = set()
        self._lock = threading.Condition()
        self._stop = threading.Event()
        self._listener: Listener | None = None
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def subscribe(
        self, job_id: uuid.UUID, *, wants_previews: bool, after: str = BEGINNING
    ) -> tuple[Subscription, Sequence[JobEvent]]:
        """Return a subscription, and what happened after the event `after`.

        Later events come to the subscription. The caller must `unsubscribe`. Raises
        TooManySubscribers.
        """
        subscription = Subscription(job_id, wants_previews=wants_previews)
        with self._lock:
            if len(self._all_subscriptions) >= self._max_subscriptions or self._stop.is_set():
                raise TooManySubscribers
            self._all_subscriptions.add(subscription)
            telemetry.EVENT_STREAMS.set(len(self._all_subscriptions))
            if self._listener is None:
                self._listener = Listener(self._url, ENDINGS, lambda ended: self.end([ended]))
                self._thread.start()
        return subscription, self._catch_up(subscription, after)

    def unsubscribe(self, subscription: Subscription) -> None:
        """Forget the follower; harmless when repeated."""
        with self._lock:
            self._all_subscriptions.discard(subscription)
            telemetry.EVENT_STREAMS.set(len(self._all_subscriptions))
            subscriptions = self._subscriptions.get(subscription.job_id, [])
            if subscription in subscriptions:
                subscriptions.remove(subscription)
                if not subscriptions:
                    del self._subscriptions[subscription.job_id]
                    del self._positions[subscription.job_id]

    def followed_jobs(self) -> list[uuid.UUID]:
        """List the jobs that somebody follows."""
        with self._lock:
            return list(self._positions)

    def end(self, job_ids: Collection[uuid.UUID]) -> None:
        """Tell followers that these jobs have ended, after all that is known of them."""
        is_there = True
        for job_id in job_ids:
            with self._lock:
                position = self._positions.get(job_id)
            if position is None:
                continue
            try:
                rest = self._range(job_id, position) if is_there else []
            except redis.RedisError:
                rest = []
                is_there = False
            self._distribute(job_id, [*rest, JobEvent(None, FINAL, {})])

    def watched_jobs(self) -> list[uuid.UUID]:
        """List the jobs whose previews a follower wants."""
        with self._lock:
            return [
                job_id
                for job_id, subscriptions in self._subscriptions.items()
                if any(subscription.wants_previews for subscription in subscriptions)
            ]

    def close(self) -> None:
        """Send every follower away, and stop."""
        self._stop.set()
        with self._lock:
            self._lock.notify_all()
            for subscription in self._all_subscriptions:
                subscription.put(SHUTDOWN)
        self._wake()
        if self._listener is not None:
            self._listener.close()
            self._thread.join(timeout=3)

    def _catch_up(self, subscription: Subscription, after: str) -> list[JobEvent]:
        """Read what happened before, and add the subscription, without gap or overlap."""
        first = self._try_range(subscription.job_id, after)
        events = first or []
        position = (events[-1].id if events else None) or after
        subscription.seen = eventlog.order(after)
        with self._lock:
            read_to = self._positions.setdefault(subscription.job_id, position)
            self._subscriptions.setdefault(subscription.job_id, []).append(subscription)
            self._lock.notify_all()
        # Other followers of the job got these events before this one was added.
        if eventlog.order(read_to) > eventlog.order(position):
            events += self._try_range(subscription.job_id, position) or []
        if first is not None:  # one wait for a Redis that is away is enough
            self._wake()
        return [
            event
            for event in events
            if subscription.is_new(event) and (subscription.wants_previews or event.kind != PREVIEW)
        ]

    def _try_range(self, job_id: uuid.UUID, after: str) -> list[JobEvent] | None:
        try:
            return self._range(job_id, after)
        except redis.RedisError as error:
            log.info("events_not_read", job_id=str(job_id), reason=type(error).__name__)
            return None

    def _range(self, job_id: uuid.UUID, after: str) -> list[JobEvent]:
        return _events(connections.xrange(self._redis, eventlog.key(job_id), after=after))

    def _wake(self) -> None:
        """Have the reading thread look at its list of jobs now; it does so every `_BLOCK_MS`."""
        try:
            pipe = self._redis.pipeline(transaction=False)
            pipe.xadd(self._wake_key, {"": ""}, maxlen=1, approximate=False)
            pipe.expire(self._wake_key, 60)
            pipe.execute()
        except redis.RedisError:
            return

    def _run(self) -> None:
        while not self._stop.wait(READ_EVERY_S):
            with self._lock:
                self._lock.wait_for(lambda: self._positions or self._stop.is_set())
                positions = {
                    eventlog.key(job_id): position for job_id, position in self._positions.items()
                }
            try:
                self._read(positions)
            except redis.RedisError as error:
                log.info("events_not_read", reason=type(error).__name__)
                self._stop.wait(0.5)
            except Exception as error:  # one bad entry must not make us deaf to all jobs
                log.error("events_not_handed_out", exc_info=error)
                self._stop.wait(0.5)

    def _read(self, positions: dict[str, str]) -> None:
        for raw_key, entries in connections.xread(
            self._redis, {**positions, self._wake_key: self._wake_id}, block_ms=_BLOCK_MS
        ):
            name = raw_key.decode()
            if name == self._wake_key:
                self._wake_id = entries[-1][0].decode()
            else:
                self._distribute(uuid.UUID(name.partition(":")[2]), _events(entries))

    def _distribute(self, job_id: uuid.UUID, events: Sequence[JobEvent]) -> None:
        """Queue the events for each follower of the job.

        Under the lock: a follower that is added meanwhile gets each event either here or from its
        own reading, never from both.
        """
        with self._lock:
            if job_id not in self._positions:
                return
            ids = [event.id for event in events if event.id is not None]
            self._positions[job_id] = max([self._positions[job_id], *ids], key=eventlog.order)
            for subscription in self._subscriptions[job_id]:
                for event in events:
                    subscription.put(event)


def _events(entries: list[connections.Entry]) -> list[JobEvent]:
    events = []
    for raw_id, fields in entries:
        try:
            events.append(eventlog.parse(raw_id, fields))
        except (ValueError, KeyError, TypeError, OSError, AttributeError):
            log.warning("event_not_understood", id=raw_id.decode())
    return events
