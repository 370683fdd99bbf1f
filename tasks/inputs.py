"""A worker's side of pictures that jobs start from: ask for them, wait until they are in the hand-off, drop them in the end."""

import time
import uuid
from contextlib import suppress
from dataclasses import dataclass

import structlog

from edges import telemetry
from edges.broker import Broker, BrokerUnavailable
from edges.handoff import HandoffUnavailable
from edges.inputs import Brought, Gone, Inputs
from engine.request import Picture
from models import files
from policy import queues
from policy.fleet import Fleet
from tasks.keeper import Held

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 0.02
ASK_EVERY_S = 2.0


class InputGone(Exception):
    """A picture that the job starts from is not in the store any more: no retry helps. The message may be told to the tenant."""


class InputsLate(Exception):
    """Nobody brought the pictures in time: the store, the results workers or the broker are away. The job itself is sound."""


@dataclass(frozen=True, kw_only=True)
class PictureDesk:
    """One per worker."""

    fleet: Fleet
    broker: Broker
    inputs: Inputs
    wait_s: float = 30.0

    def of(self, held: Held) -> dict[str, Picture] | None:
        """The job's pictures by role, {} if it starts from none; None as soon as the job is to be let go of.

        Raises InputGone, InputsLate.
        """
        job = held.lease.job
        wanted = files.of_job(job)
        if not wanted:
            return {}
        started = time.monotonic()
        asked_at = -ASK_EVERY_S
        while (waited_s := time.monotonic() - started) < self.wait_s:
            if held.lost.is_set() or held.leaving:
                return None
            brought = self._brought(job.id)
            if brought.keys() >= wanted.keys():
                telemetry.INPUT_WAIT_SECONDS.observe(waited_s)
                return {role: _picture(brought[role]) for role in wanted}
            if waited_s - asked_at >= ASK_EVERY_S:
                self._ask(job.tier, job.id, is_first=asked_at < 0)
                asked_at = waited_s
            held.lost.wait(LOOK_EVERY_S)
        raise InputsLate(f"the pictures it starts from did not come within {self.wait_s:g} s")

    def drop(self, held: Held) -> None:
        """The job is in the engine no more: whoever renders it next asks again."""
        if files.of_job(held.lease.job):
            with suppress(HandoffUnavailable):
                self.inputs.drop([held.lease.job_id])

    def _brought(self, job_id: uuid.UUID) -> dict[str, Brought]:
        try:
            return self.inputs.of(job_id)
        except HandoffUnavailable as error:
            log.info("inputs_not_seen", reason=str(error))
            return {}

    def _ask(self, tier: str, job_id: uuid.UUID, *, is_first: bool) -> None:
        """Ask once; again only when nothing waits to be taken: while nobody takes anything, messages would be all that multiplies."""
        queue = queues.results_queue(self.fleet, tier)
        try:
            if is_first or not self.broker.waiting(queue):
                self.broker.announce(queues.BRING_INPUTS, queue, job_id)
        except BrokerUnavailable as error:
            log.warning("inputs_not_asked_for", reason=str(error))


def _picture(brought: Brought) -> Picture:
    if isinstance(brought, Gone):
        raise InputGone(brought.reason)
    return Picture(brought)
