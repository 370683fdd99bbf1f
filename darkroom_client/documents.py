"""Type the API's documents other than jobs.

`members` of each is the JSON object as it came, including what this version does not know.
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
    """The result of one job of a batch: its id, or the problem for which it was refused.

    `members` has some parameters of the job, not all.
    """

    job_id: str | None
    problem: ProblemError | None
    members: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Estimate(Parameters):
    """The job that a request would create now, with its price and its wait.

    refusal: why it would be refused; its `retry_after_s` says when it may be accepted.
    """

    can_be_served: bool
    refusal: ProblemError | None
    seed: int | None  # None: it would be chosen at random
    start_deadline_s: float | None
    megapixel_steps: float
    cost: Cost | None
    queue: Queue | None
    warnings: tuple[JobWarning, ...]  # as far as they are known without a worker
    members: Mapping[str, Any] = field(repr=False)  # the JSON object as it came


@dataclass(frozen=True, kw_only=True)
class Status:
    """The state and the progress of a job, without its other members."""

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
    """An uploaded picture. The same picture, uploaded twice, is one file."""

    id: str
    width_px: int | None
    height_px: int | None
    members: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """The tenant's usage and limits; `members` has the whole document."""

    members: Mapping[str, Any]
