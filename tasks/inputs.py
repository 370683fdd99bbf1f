"""A worker's side of pictures that jobs start from: they are in the hand-off before it is asked; take them, drop them in the end."""

from contextlib import suppress
from dataclasses import dataclass

import structlog

from edges.handoff import HandoffUnavailable
from edges.inputs import Brought, Gone, Inputs
from engine.request import Picture
from models.tables import Job
from policy.params import pictures_of

log = structlog.get_logger(__name__)


class InputGone(Exception):
    """A picture that the job starts from is not in the store any more: no retry helps. The message may be told to the tenant."""


class InputsMissing(Exception):
    """The pictures are not in the hand-off, or it is away. The job itself is sound: it waits until they were brought again."""


@dataclass(frozen=True, kw_only=True)
class InputPictures:
    """One per worker."""

    inputs: Inputs

    def of(self, job: Job) -> dict[str, Picture]:
        """Take the job's pictures by role, {} if it starts from none.

        Raises InputGone, and InputsMissing at once: a lease is no place to wait.
        """
        wanted = pictures_of(job)
        if not wanted:
            return {}
        brought = self._brought(job)
        if not brought.keys() >= wanted.keys():
            self.drop(job)  # or what is there of them would be taken for all
            raise InputsMissing("the pictures it starts from are not in the hand-off")
        return {role: _picture(brought[role]) for role in wanted}

    def drop(self, job: Job) -> None:
        """The job will not be rendered again; should it be, they are brought again."""
        if pictures_of(job):
            with suppress(HandoffUnavailable):
                self.inputs.drop([job.id])

    def _brought(self, job: Job) -> dict[str, Brought]:
        try:
            return self.inputs.of(job.id)
        except HandoffUnavailable as error:  # or they are spoilt: others must come in their place
            self.drop(job)
            raise InputsMissing(str(error)) from error


def _picture(brought: Brought) -> Picture:
    if isinstance(brought, Gone):
        raise InputGone(brought.reason)
    return Picture(brought)
