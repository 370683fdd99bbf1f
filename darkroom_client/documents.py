"""Type the API's documents other than jobs.

Each keeps the JSON object as it came in `members`, including what this version does not know.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from darkroom_client.errors import ProblemError
from darkroom_client.jobs import (
    FINAL_STATES,
    Cost,
    Failure,
    JobWarning,
    Parameters,
    Progress,
    Queue,
)


@dataclass(frozen=True, kw_only=True)
class Submission:
    """The outcome of one wish of a batch: a job, or the problem why there is none.

    Of the job only the id and a few parameters are known.
    """

    job_id: str | None
    problem: ProblemError | None
    members: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Estimate(Parameters):
    """What a wish would become if it were sent now.

    refusal: why it would not be accepted; its `retry_after_s` says when it may be.
    """

    can_be_served: bool
    refusal: ProblemError | None
    seed: int | None  # None: one is drawn for the job
    start_deadline_s: float | None
    megapixel_steps: float
    cost: Cost | None
    queue: Queue | None
    warnings: tuple[JobWarning, ...]  # as far as they are known without a worker
    members: Mapping[str, Any] = field(repr=False)  # the JSON object as it came


@dataclass(frozen=True, kw_only=True)
class Status:
    """A job's state and how far it is, without the rest of it."""

    id: str
    state: str
    attempt: int | None
    progress: Progress | None
    queue: Queue | None
    failure: Failure | None
    members: Mapping[str, Any] = field(repr=False)

    @property
    def is_finished(self) -> bool:
        """Tell whether the state is final."""
        return self.state in FINAL_STATES


@dataclass(frozen=True, kw_only=True)
class File:
    """A picture of the tenant's, as it is kept. The same picture twice is one file."""

    id: str
    width_px: int | None
    height_px: int | None
    members: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What the tenant used, and what it may use: read it from `members`."""

    members: Mapping[str, Any]
