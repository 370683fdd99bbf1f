"""Type a job as the API shows it. `Job.members` keeps members that this version does not know."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import NoneType, UnionType
from typing import Any, cast, get_args, get_type_hints

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
FINAL_STATES = frozenset({"succeeded", "failed", "rejected", "canceled", "expired"})


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The reason why a job failed or was rejected: a stable code and a sentence."""

    code: str
    detail: str | None


@dataclass(frozen=True, kw_only=True)
class JobWarning:
    """A part of the request that had no effect on the images.

    It has a stable code, the field of the request, and a sentence for people.
    """

    code: str
    field: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a job.

    It has the denoise steps done and to do, summed over its images, and the number of images
    stored.
    """

    step: int
    num_steps: int
    images_done: int


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of each part of the job; None for a part that has not ended."""

    queue_s: float | None
    render_s: float | None
    store_s: float | None
    total_s: float | None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of the job so far. amount: a decimal number as text, because it is exact."""

    gpu_seconds: float
    amount: str
    currency: str


@dataclass(frozen=True, kw_only=True)
class Queue:
    """The place of an unfinished job in its queue.

    It holds the jobs of its tier ahead of it (None once it runs) and the seconds until its images
    are stored.
    """

    jobs_ahead: int | None
    eta_p50_s: float | None
    eta_p90_s: float | None


@dataclass(frozen=True, kw_only=True)
class Image:
    """One image of a job; what is not known before it is stored is None."""

    index: int
    seed: int
    state: str
    url: str | None
    pixels_sha256: str | None  # of the decoded RGB: what "the same image" means
    content_sha256: str | None  # of the stored bytes
    content_type: str | None
    size_bytes: int | None
    width_px: int | None
    height_px: int | None


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Every parameter of a job, resolved, as jobs and estimates tell them."""

    tier: str
    model: str
    model_alias: str | None  # what the request called the model, where that is not its id
    model_version: str
    prompt: str | None  # None once the job was erased
    negative_prompt: str | None
    size: str
    steps: int
    guidance: float
    sampler: str
    n: int
    output_format: str
    init_image: str | None  # ids of files
    mask: str | None
    control_image: str | None
    strength: float | None
    clip_skip: int | None  # layers of the CLIP text encoder left out at its end
    adapters: tuple[Mapping[str, Any], ...]  # each with its name and its strength
    precision: str | None
    determinism: str | None
    bucket_rows: int | None  # of the denoiser's forward, where the same pixels are promised
    metadata: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Job(Parameters):
    """A job: its parameters, its state and its images."""

    id: str
    state: str
    seed: int
    replay_of: str | None
    megapixel_steps: float | None  # what it counts against quotas
    attempt: int
    failure: Failure | None
    warnings: tuple[JobWarning, ...]
    prompt_tokens: int | None  # None until an image is rendered, and where nobody can tell
    truncated_tokens: int | None  # those of them that the model did not read
    created_at: datetime
    start_by: datetime | None
    started_at: datetime | None
    rendered_at: datetime | None
    finished_at: datetime | None
    run_by: datetime | None
    erased_at: datetime | None
    progress: Progress | None
    queue: Queue | None
    timing: Timing
    cost: Cost | None
    images: tuple[Image, ...]
    urls: Mapping[str, str]
    members: Mapping[str, Any] = field(repr=False)  # the JSON object as it came

    @property
    def is_finished(self) -> bool:
        """Tell whether the state is final."""
        return self.state in FINAL_STATES

    @classmethod
    def from_json(cls, members: Mapping[str, Any]) -> "Job":
        """Read a job from its JSON members.

        Raises KeyError, TypeError or ValueError when they are no job. Members that may become part
        of a file name cannot point to another folder, whoever answers: an id has no dots or
        slashes, and a number is a number.
        """
        plain = plain_of(cls, members)
        if not _ID.fullmatch(plain["id"]):
            raise ValueError("an id is letters, digits, - and _")
        plain["seed"] = int(plain["seed"])
        return cls(
            **plain,
            **parameters_of(members),
            failure=part_of(Failure, members.get("failure")),
            warnings=warnings_of(members),
            progress=part_of(Progress, members.get("progress")),
            queue=part_of(Queue, members.get("queue")),
            timing=part_of(Timing, members.get("timing") or {}),
            cost=cost_of(members.get("cost")),
            images=tuple(_image(image) for image in members["images"]),
            urls=dict(members.get("urls") or {}),
            members=members,
        )


def parameters_of(members: Mapping[str, Any]) -> dict[str, Any]:
    """Read those parameters that are neither texts nor numbers."""
    return {
        "adapters": tuple(dict(adapter) for adapter in members.get("adapters") or ()),
        "metadata": dict(members.get("metadata") or {}),
    }


def plain_of(kind: type[Any], members: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields of `kind` that are texts, numbers or instants, by their types.

    What may be None may be missing: older gateways send less. Raises KeyError for the others.
    """
    read: dict[str, Any] = {}
    for name, hint in _hints_of(kind).items():
        kinds = set(get_args(hint) if isinstance(hint, UnionType) else (hint,))
        if kinds <= _PLAIN:
            value = members.get(name) if NoneType in kinds else members[name]
            read[name] = datetime.fromisoformat(value) if value and datetime in kinds else value
    return read


_PLAIN = {str, int, float, bool, datetime, NoneType}
_hints_of = cast("Callable[[type[Any]], dict[str, Any]]", functools.cache(get_type_hints))


def _image(members: Mapping[str, Any]) -> Image:
    plain: dict[str, Any] = {name: members.get(name) for name in Image.__annotations__}
    return Image(**plain | {name: int(members[name]) for name in ("index", "seed")})


def part_of(kind: type[Any], members: Mapping[str, Any] | None) -> Any:
    """Make a `kind` from the members that it knows; None from None."""
    return (
        kind(**{name: members.get(name) for name in kind.__annotations__})
        if members is not None
        else None
    )


def warnings_of(members: Mapping[str, Any]) -> tuple[JobWarning, ...]:
    """Read the warnings of a job or an estimate; none where the gateway sends none."""
    return tuple(part_of(JobWarning, warning) for warning in members.get("warnings") or ())


def cost_of(members: Mapping[str, Any] | None) -> Cost | None:
    if members is None:
        return None
    return Cost(
        gpu_seconds=float(members["gpu_seconds"]),
        amount=str(members["amount"]),
        currency=members["currency"],
    )
