"""Take a job's input pictures from the hand-off, and drop them in the end.

They are there before a worker is asked to render the job.
"""

from contextlib import suppress
from dataclasses import dataclass

import structlog

from edges.handoff import HandoffUnavailable
from edges.inputs import Inputs, PictureGone, StagedPicture
from engine.request import Picture
from models.tables import Job
from policy.params import pictures_of

log = structlog.get_logger(__name__)


class InputGone(Exception):
    """An input picture is no longer in the store: no retry helps.

    The message may be shown to the tenant.
    """


class InputsMissing(Exception):
    """The pictures are not in the hand-off, or it is away; the job waits until they are there."""


@dataclass(frozen=True, kw_only=True)
class InputPictures:
    """Take and drop the input pictures of a worker's jobs."""

    inputs: Inputs

    def of(self, job: Job) -> dict[str, Picture]:
        """Return the job's pictures by role, {} if it has none.

        Raises InputGone, and InputsMissing at once: a job that holds a lease must not wait.
        """
        wanted = pictures_of(job)
        if not wanted:
            return {}
        brought = self._brought(job)
        if not brought.keys() >= wanted.keys():
            self.drop(job)  # or those that are there would be taken for all
            raise InputsMissing("the pictures it starts from are not in the hand-off")
        return {role: _picture(brought[role]) for role in wanted}

    def drop(self, job: Job) -> None:
        """Delete the pictures of a rendered job; they are brought again if it is rendered again."""
        if pictures_of(job):
            with suppress(HandoffUnavailable):
                self.inputs.drop([job.id])

    def _brought(self, job: Job) -> dict[str, StagedPicture]:
        try:
            return self.inputs.of(job.id)
        except HandoffUnavailable as error:  # or they are damaged: they must be brought again
            self.drop(job)
            raise InputsMissing(str(error)) from error


def _picture(brought: StagedPicture) -> Picture:
    if isinstance(brought, PictureGone):
        raise InputGone(brought.reason)
    return Picture(brought)
