"""Measure what this worker's time is spent on, from the start of its process until it signs off."""

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

from edges import processes
from models import devicetime
from models.devicetime import DevicePeriod, DeviceSeconds
from policy.workers import WorkerTerms

if TYPE_CHECKING:
    from tasks.registration import WorkerIdentity

Stats = Callable[[], Mapping[str, Any]]


class DeviceMeter:
    """Tell the period that runs, again and again; a new one begins with each hour and new terms."""

    def __init__(self) -> None:
        self._began_at = time.monotonic() - processes.age_s()
        self._lock = threading.Lock()  # at a worker's start two threads tell of it
        self._stats: Stats = dict
        self._startup_s: float | None = None
        self._told = DeviceSeconds()  # until now
        self._before = DeviceSeconds()  # until the period began
        self._since: datetime | None = None
        self._terms: WorkerTerms | None = None

    def watch(self, stats: Stats) -> None:
        """Ask this engine, which is ready, from now on: until then all time is its start's."""
        with self._lock:
            began_s = sum(stats()[f"{doing}_s"] for doing in ("idle", "turns", "loads"))
            self._startup_s = time.monotonic() - self._began_at - began_s
            self._stats = stats

    def period(
        self, *, worker: str, instance: uuid.UUID, pool: str, terms: WorkerTerms
    ) -> DevicePeriod:
        """Tell of the period until now."""
        with self._lock:
            now = datetime.now(UTC)
            since = self._since
            if since is None or terms != self._terms or _hour(now) != _hour(since):
                self._before = self._told
                self._since = since = now
                self._terms = terms
            self._told = self._measure()
            spent = self._told.since(self._before)
        return DevicePeriod(
            worker=worker, instance=instance, pool=pool, terms=terms, since=since, spent=spent
        )

    def write(self, session: Session, who: "WorkerIdentity") -> None:
        """Write the period until now, as `who`; the caller commits."""
        period = self.period(worker=who.name, instance=who.instance, pool=who.pool, terms=who.terms)
        devicetime.put(session, period)

    def _measure(self) -> DeviceSeconds:
        stats = self._stats()
        billed_s = time.monotonic() - self._began_at
        return DeviceSeconds(
            billed_s=billed_s,
            startup_s=billed_s if self._startup_s is None else self._startup_s,
            idle_s=stats.get("idle_s", 0.0),
            turns_s=stats.get("turns_s", 0.0),
            loads_s=stats.get("loads_s", 0.0),
            encode_s=stats.get("encode_s", 0.0),
            denoise_s=stats.get("forward_s", 0.0),
            decode_s=stats.get("decode_s", 0.0),
            padding_s=stats.get("padding_s", 0.0),
        )


def _hour(moment: datetime) -> datetime:
    return moment.replace(minute=0, second=0, microsecond=0)
