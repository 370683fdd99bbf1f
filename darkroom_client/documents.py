"""What the API tells beside jobs, typed. Each keeps in `members` the JSON object as it came, with what this version does not know."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from darkroom_client.errors import ProblemError
from darkroom_client.jobs import FINAL_STATES, Cost, Job, Progress, Queue, cost_of, part_of


@dataclass(frozen=True)
class Submission:
    """What became of one wish of a batch: a job, or the reason why there is none."""

    index: int
    job: Job | None
    problem: ProblemError | None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a wish would become now. problem: why it would be refused."""

    can_be_served: bool
    parameters: Mapping[str, Any]
    megapixel_steps: float | None
    cost: Cost | None
    queue: Queue | None
    members: Mapping[str, Any] = field(repr=False)

    @classmethod
    def from_json(cls, members: Mapping[str, Any]) -> "Estimate":
        """Raises KeyError, TypeError or ValueError when this is no estimate."""
        return cls(
            can_be_served=bool(members["servable"]),
            parameters=members["parameters"],
            megapixel_steps=members.get("megapixel_steps"),
            cost=cost_of(members.get("cost")),
            queue=part_of(Queue, members.get("queue")),
            members=members,
        )


@dataclass(frozen=True, kw_only=True)
class Status:
    """A job's state and how far it is, without the rest of it."""

    id: str
    state: str
    progress: Progress | None
    queue: Queue | None
    members: Mapping[str, Any] = field(repr=False)

    @property
    def is_finished(self) -> bool:
        """Whether the state is final."""
        return self.state in FINAL_STATES

    @classmethod
    def from_json(cls, members: Mapping[str, Any]) -> "Status":
        """Raises KeyError when this is no status."""
        progress, queue = part_of(Progress, members.get("progress")), part_of(Queue, members.get("queue"))
        return cls(id=members["id"], state=members["state"], progress=progress, queue=queue, members=members)


@dataclass(frozen=True, kw_only=True)
class File:
    """A picture of the tenant's, as it is kept. The same picture twice is one file."""

    id: str
    width_px: int | None
    height_px: int | None
    members: Mapping[str, Any] = field(repr=False)

    @classmethod
    def from_json(cls, members: Mapping[str, Any]) -> "File":
        """Raises KeyError when this is no file."""
        return cls(id=members["id"], width_px=members.get("width_px"), height_px=members.get("height_px"), members=members)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What the tenant used, and what it may use."""

    members: Mapping[str, Any]

    @classmethod
    def from_json(cls, members: Mapping[str, Any]) -> "Usage":
        return cls(members=members)
