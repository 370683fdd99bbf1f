"""Stream a job's events to the client that follows it, from its place in the queue to its end.

Events that come through Redis may be lost. The end of a stream is decided by Postgres: it is
queried every few seconds about all followed jobs at once, and about one job when its end is
announced.
"""

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from app.caller import Caller
from app.live.capacity import Capacity, Holding
from app.live.forecast import QueueForecaster, QueuePlace
from app.live.keyring import NO_LIVE_KEY, Keyring
from app.problems import JobNotFound, StreamsExhausted, Unauthenticated
from app.schemas import events as schemas
from app.schemas.base import to_plain
from edges import telemetry
from edges.eventlog import BEGINNING, FINAL, QUEUED, STARTED, JobEvent
from edges.events import SHUTDOWN, EventFanout, Subscription, TooManySubscribers
from edges.progress import JobSignals
from models import jobs
from models.database import transaction
from models.tables import Job
from policy.states import FINAL_STATES, JobState

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 5.0
CHECK_KEYS_EVERY_S = 0.5
_REVOKED = JobEvent(None, "revoked", {})

# Shows an event to a client: takes the event, its job's id, and for `final` the ended job.
Tell = Callable[[JobEvent, uuid.UUID, Job | None], JobEvent]


class Watchers:
    """Counts how many clients of this process stream each job."""

    def __init__(self) -> None:
        self._counts: Counter[uuid.UUID] = Counter()
        self._lock = threading.Lock()

    def enter(self, job_id: uuid.UUID) -> None:
        with self._lock:
            self._counts[job_id] += 1

    def leave(self, job_id: uuid.UUID) -> bool:
        """Count one client less; return whether it was the last."""
        with self._lock:
            self._counts[job_id] -= 1
            is_last = self._counts[job_id] == 0
            if is_last:
                del self._counts[job_id]
            return is_last


class JobEventStreams:
    """The event streams of one gateway process; its threads start with the first follower."""

    def __init__(
        self,
        database: Engine,
        forecaster: QueueForecaster,
        signals: JobSignals,
        fanout: EventFanout,
        keyring: Keyring,
        *,
        most: int,
    ) -> None:
        self._database = database
        self._forecaster = forecaster
        self._signals = signals
        self._fanout = fanout
        self._keyring = keyring
        self._places = Capacity(most)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._kids: dict[Subscription, str] = {}  # the public id of each follower's key
        self._reconciler: threading.Thread | None = None

    def take_place(self, tenant_id: uuid.UUID) -> Holding:
        """Reserve a stream for the tenant. Raises StreamsExhausted."""
        place = self._places.take(tenant_id)
        if place is None:
            telemetry.SHED.labels("streams_exhausted").inc()
            whose = f"your tenant has {self._places.held_by(tenant_id)} of {self._places.most}"
            raise StreamsExhausted(
                f"This process cannot open another event stream; {whose}.", retry_after_s=5
            )
        return place

    def follow(
        self,
        caller: Caller,
        job_id: uuid.UUID,
        *,
        tell: Tell,
        after: str | None = None,
        previews: bool = False,
        heartbeat_s: float = 10,
        place: Holding | None = None,
    ) -> Iterator[JobEvent | None]:
        """Yield the events of the caller's job after the event `after`, until its end.

        Yields None when a heartbeat is due. While the job waits, `queued` comes first, and again
        when the forecast changes; `final` comes last, with the whole job. When this process ends,
        the iterator ends without `final`. When the caller's key is revoked or expires, it raises
        Unauthenticated. Closing or dropping the iterator ends the subscription and frees its place.

        tell: called with each event, by the iterating thread. place: reserved before; None reserves
        one. Raises JobNotFound, StreamsExhausted.
        """
        place = place or self.take_place(caller.tenant_id)
        stream = self._stream(
            caller,
            job_id,
            tell=tell,
            after=after or BEGINNING,
            previews=previews,
            heartbeat_s=heartbeat_s,
            place=place,
        )
        # Run it up to the subscription, or the refusal. From then on, closing the generator also
        # unsubscribes, even if nobody ever takes an event.
        next(stream)
        return stream

    def close(self) -> None:
        """End every stream; clients reconnect elsewhere and go on after their last event."""
        self._stop.set()
        self._fanout.close()

    def _stream(
        self,
        caller: Caller,
        job_id: uuid.UUID,
        *,
        tell: Tell,
        after: str,
        previews: bool,
        heartbeat_s: float,
        place: Holding,
    ) -> Iterator[JobEvent | None]:
        subscription, earlier = self._subscribe(job_id, place, previews=previews, after=after)
        with self._lock:
            self._kids[subscription] = caller.kid
        try:
            # Read after the subscription, so that no end is missed in between.
            job = self._find(job_id, caller.tenant_id)
            if job is None:
                raise JobNotFound(f"There is no job {job_id}.")
            if previews and job.state not in FINAL_STATES:
                self._signals.publish_watched([job_id])
            self._start_threads()
            yield None
            yield from self._until_end(
                job, self._events(job, subscription, earlier, heartbeat_s), tell
            )
        finally:
            with self._lock:
                del self._kids[subscription]
            self._fanout.unsubscribe(subscription)
            place.release()

    def _subscribe(
        self, job_id: uuid.UUID, place: Holding, *, previews: bool, after: str
    ) -> tuple[Subscription, Sequence[JobEvent]]:
        """Subscribe to the job's events; frees `place` if that fails. Raises StreamsExhausted."""
        try:
            return self._fanout.subscribe(job_id, wants_previews=previews, after=after)
        except TooManySubscribers:
            place.release()
            raise StreamsExhausted(
                "This process cannot open another event stream.", retry_after_s=5
            ) from None
        except BaseException:
            place.release()
            raise

    def _until_end(
        self, job: Job, events: Iterator[JobEvent | None], tell: Tell
    ) -> Iterator[JobEvent | None]:
        """Yield the events up to the job's end, and None for a heartbeat."""
        for event in events:
            if event is None:
                yield None
                continue
            whole = self._ended(job) if event.kind == FINAL else None
            if event.kind == FINAL and whole is None:
                continue  # Postgres is away for now; the reconciler sends `final` again
            telemetry.EVENTS_SENT.labels(event.kind).inc()
            yield tell(event, job.id, whole)
            if event.kind == FINAL:
                return

    def _events(
        self, job: Job, subscription: Subscription, earlier: Sequence[JobEvent], heartbeat_s: float
    ) -> Iterator[JobEvent | None]:
        """Yield events as they arrive; ends only when this process does."""
        forecast = _Forecast(self._forecaster, job)
        yield from forecast.due_event()
        for past in earlier:
            forecast.hear(past)
            yield past
        if job.state in FINAL_STATES:
            yield JobEvent(None, FINAL, {})
        beat_at = time.monotonic() + heartbeat_s
        while (
            event := subscription.get(min(beat_at, forecast.due_at) - time.monotonic())
        ) is not SHUTDOWN:
            if event is _REVOKED:
                raise Unauthenticated(NO_LIVE_KEY)
            heard = [event] if event is not None else forecast.due_event()
            for each in heard:
                forecast.hear(each)
                yield each
            if heard:
                beat_at = time.monotonic() + heartbeat_s
            elif time.monotonic() >= beat_at:
                yield None
                beat_at = time.monotonic() + heartbeat_s

    def _find(self, job_id: uuid.UUID, tenant_id: uuid.UUID) -> Job | None:
        with transaction(self._database) as session:
            return jobs.find(session, job_id, tenant_id=tenant_id)

    def _ended(self, job: Job) -> Job | None:
        """Return the job as it ended; None if it has not ended or Postgres cannot be read."""
        try:
            found = self._find(job.id, job.tenant_id)
        except SQLAlchemyError as error:
            log.warning("end_of_job_not_read", job_id=str(job.id), reason=type(error).__name__)
            return None
        return found if found is not None and found.state in FINAL_STATES else None

    def _start_threads(self) -> None:
        with self._lock:
            if self._reconciler is None:
                self._reconciler = threading.Thread(
                    target=self._poll_ended_jobs, name="event-net", daemon=True
                )
                self._reconciler.start()
                threading.Thread(target=self._check_keys, name="event-keys", daemon=True).start()

    def _poll_ended_jobs(self) -> None:
        """Look in Postgres for ends that were not announced; report which previews are watched."""
        while not self._stop.wait(LOOK_EVERY_S):
            try:
                if followed := self._fanout.followed_jobs():
                    with transaction(self._database) as session:
                        ended = jobs.ended_among(session, followed)
                    self._fanout.end(ended)
                if watched := self._fanout.watched_jobs():
                    self._signals.publish_watched(watched)
            except SQLAlchemyError as error:
                log.warning("ends_of_jobs_not_read", reason=type(error).__name__)

    def _check_keys(self) -> None:
        """End the streams whose key is no longer live."""
        while not self._stop.wait(CHECK_KEYS_EVERY_S):
            with self._lock:
                followers = dict(self._kids)
            ended = {kid for kid in set(followers.values()) if not self._keyring.is_live(kid)}
            for subscription, kid in followers.items():
                if kid in ended:
                    subscription.put(_REVOKED)


class _Forecast:
    """Decides when to send a waiting job its queue position: at once, and after a real change."""

    def __init__(self, forecaster: QueueForecaster, job: Job) -> None:
        self._forecaster = forecaster
        self._job = job
        self._has_told = False
        self._told_at = 0.0
        self._told: QueuePlace | None = None
        self.due_at = time.monotonic() if job.state == JobState.QUEUED else float("inf")

    def hear(self, event: JobEvent) -> None:
        """Stop forecasting when a new attempt starts; events of earlier attempts do not count."""
        if event.kind == STARTED and event.data.get("attempt", 0) > self._job.attempt:
            self.due_at = float("inf")

    def due_event(self) -> list[JobEvent]:
        """Return a `queued` event if a look is due and the position has changed; else nothing."""
        now = time.monotonic()
        if now < self.due_at:
            return []
        self.due_at = now + LOOK_EVERY_S
        try:
            place = self._forecaster.place_of(self._job)
        except SQLAlchemyError:
            place = None
        if not self._has_moved(place, now):
            return []
        self._has_told = True
        self._told = place
        self._told_at = now
        return [JobEvent(None, QUEUED, to_plain(_queued(place)))]

    def _has_moved(self, place: QueuePlace | None, now: float) -> bool:
        """Tell whether the position or the expected end has moved by more than a tenth.

        Far back in a long queue, smaller moves would be noise.
        """
        if place is None or place.jobs_ahead is None:
            return not self._has_told
        if self._told is None or self._told.jobs_ahead is None:
            return True
        moved = abs(place.jobs_ahead - self._told.jobs_ahead)
        shift_s = (now + place.eta.p50_s) - (self._told_at + self._told.eta.p50_s)
        return moved > 0.1 * place.jobs_ahead or abs(shift_s) > max(1.0, 0.1 * place.eta.p50_s)


def _queued(place: QueuePlace | None) -> schemas.QueuedEvent:
    """Build the `queued` event; its members are null where no forecast is possible."""
    if place is None:
        return schemas.QueuedEvent(jobs_ahead=None, eta_p50_s=None, eta_p90_s=None)
    return schemas.QueuedEvent(
        jobs_ahead=place.jobs_ahead,
        eta_p50_s=round(place.eta.p50_s, 2),
        eta_p90_s=round(place.eta.p90_s, 2),
    )
