"""List every parameter of a job once: what a request may ask for, and what it becomes.

`RequestedParams` is what a tenant asked for, `Resolved` the complete parameters made from it. The
note on each field of `Resolved` says what other rooms call it and where it shows. Request bodies,
answers, columns, replays, OpenAI's extras and the engine's requests are made from this list. What
is written by hand (client, command line, documents, the view `job_history`) is compared with it by
tests/test_params.py, which names whatever is missing anywhere.

Pure values. Ranges that depend on a model or a tier are checked in policy/catalog.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, fields, replace
from enum import Flag, auto
from typing import Annotated, Any, Literal, get_args, get_type_hints
from uuid import UUID

from policy.fleet import OPEN_FAMILIES
from policy.formats import FORMATS

# Families that may take a control image; a pipeline's call decides if it has a control network.
CONTROLLED_FAMILIES = OPEN_FAMILIES

PictureKind = Literal["image", "mask"]


@dataclass(frozen=True)
class RequestedAdapter:
    """One of the model's adapters, and how much of it; below 0 it works the other way."""

    name: str
    strength: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RequestedParams:
    """A tenant's request for a job, types already right; None: not given."""

    prompt: str
    negative_prompt: str = ""
    model: str | None = None
    tier: str | None = None
    size: str | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    seed: int | None = None  # RANDOM_SEED: the same as none
    n: int = 1
    output_format: str = "png"
    # Ids of files; that they are there, and whose, is the caller's to check.
    init_image: UUID | None = None
    mask: UUID | None = None
    control_image: UUID | None = None
    strength: float | None = None
    clip_skip: int | None = None
    adapters: tuple[RequestedAdapter, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PassThrough:
    """The rule of a parameter that is taken as it was requested, in any model and tier.

    choices: the values that are accepted.  low, high: the accepted range, both included; either may
    be without the other.  families: the model families that take it; None: all.  unfit: the error
    text for other families.
    """

    choices: tuple[str, ...] | None = None
    low: int | float | None = None
    high: int | float | None = None
    families: tuple[str, ...] | None = None
    unfit: str = ""


class Use(Flag):
    """The places where a parameter is used beside requests, answers and its column."""

    NOWHERE = 0
    ENGINE = auto()  # a field of the engine's ImageRequest; where it is None, the engine's default
    OPENAI_REQUEST = auto()  # an extra that /v1/images takes
    OPENAI_ANSWER = auto()  # an extra that /v1/images tells
    OPENAI = OPENAI_REQUEST | OPENAI_ANSWER


@dataclass(frozen=True)
class Param:
    """One resolved parameter.

    member: its member in answers, and in requests if `RequestedParams` has it; None: clients do not
    see it.
    says: what it is, for clients.
    unit: of a number that has one.
    picture: what kind of picture it names the file of; `member` is then its role in the job.
    none_shown_as: what answers show where it is None.
    as_asked: its rule, if it is what the request says; None: policy/catalog.py decides.
    name, kind: its field in `Resolved`, which is its column in `jobs`.
    """

    member: str | None
    says: str
    use: Use = Use.NOWHERE
    _: KW_ONLY
    unit: str | None = None
    picture: PictureKind | None = None
    none_shown_as: tuple[()] | None = None
    pass_through: PassThrough | None = None
    name: str = ""
    kind: Any = None

    @property
    def engine_field(self) -> str | None:
        """Name the field of ImageRequest that it fills; None if it fills none."""
        if Use.ENGINE not in self.use:
            return None
        return self.member if self.picture else self.name


_CONTROL = PassThrough(
    families=CONTROLLED_FAMILIES,
    unfit="cannot be used with model {model}: it has no control network",
)
_CLIP_SKIP = PassThrough(
    low=0,
    high=12,
    families=("sd", "sdxl", "sd3", *OPEN_FAMILIES),
    unfit="cannot be used with model {model}: it does not read a single layer of a CLIP encoder",
)


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """Every parameter of a job; the same Resolved on the same device class gives the same image."""

    prompt: Annotated[
        str,
        Param("prompt", "What the images show.", Use.ENGINE, pass_through=PassThrough()),
    ]
    negative_prompt: Annotated[
        str,
        Param(
            "negative_prompt",
            "What the images should not show.",
            Use.ENGINE | Use.OPENAI_REQUEST,
            pass_through=PassThrough(),
        ),
    ]
    model: Annotated[str, Param("model", "The id of the model.", Use.OPENAI_ANSWER)]
    model_alias: Annotated[
        str | None,
        Param(
            "model_alias",
            "The alias by which the request named the model, if any.",
            Use.OPENAI_ANSWER,
        ),
    ] = None
    model_version: Annotated[
        str,
        Param("model_version", "The version of the model.", Use.OPENAI_ANSWER),
    ]
    pool: Annotated[str, Param(None, "The group of workers that serve it.")]
    tier: Annotated[str, Param("tier", "The tier of the job.", Use.OPENAI)]
    # Requests and answers tell both sides as `size`.
    width_px: Annotated[int, Param(None, "Its width.", Use.ENGINE, unit="px")]
    height_px: Annotated[int, Param(None, "Its height.", Use.ENGINE, unit="px")]
    num_steps: Annotated[
        int,
        Param(
            "steps",
            "Denoise steps of each image.",
            Use.ENGINE | Use.OPENAI,
            unit="denoise steps",
        ),
    ]
    guidance: Annotated[
        float,
        Param(
            "guidance",
            "How closely the images follow the prompt.",
            Use.ENGINE | Use.OPENAI,
        ),
    ]
    sampler: Annotated[str, Param("sampler", "The sampling method.", Use.ENGINE | Use.OPENAI)]
    seed: Annotated[
        int,
        Param("seed", "The seed of image 0; image i has seed + i.", Use.ENGINE | Use.OPENAI),
    ]
    num_images: Annotated[int, Param("n", "The number of images.", unit="images")]
    output_format: Annotated[
        str,
        Param(
            "output_format",
            "The format of the images.",
            pass_through=PassThrough(choices=tuple(FORMATS)),
        ),
    ]
    init_file_id: Annotated[
        UUID | None,
        Param(
            "init_image",
            "The id of the picture that the images start from.",
            Use.ENGINE,
            picture="image",
            pass_through=PassThrough(),
        ),
    ]
    mask_file_id: Annotated[
        UUID | None,
        Param(
            "mask",
            "The id of the picture that marks which part is painted anew.",
            Use.ENGINE,
            picture="mask",
            pass_through=PassThrough(),
        ),
    ]
    control_file_id: Annotated[
        UUID | None,
        Param(
            "control_image",
            "The id of the picture that the control network follows.",
            Use.ENGINE,
            picture="image",
            pass_through=_CONTROL,
        ),
    ]
    # The part of noise that is laid over the picture it starts from.
    strength: Annotated[
        float | None,
        Param(
            "strength",
            "How much `init_image` is changed, above 0 and at most 1; null without it, or where"
            " the model's pipeline decides.",
            Use.ENGINE | Use.OPENAI,
        ),
    ]
    # None as 0. How many layers there are, and whether a pipeline's own call takes it, the engine
    # knows.
    clip_skip: Annotated[
        int | None,
        Param(
            "clip_skip",
            "How many of the last layers of the CLIP text encoder are left out.",
            Use.ENGINE | Use.OPENAI,
            unit="layers",
            pass_through=_CLIP_SKIP,
        ),
    ]
    adapters: Annotated[
        list[dict[str, str | float]] | None,
        Param(
            "adapters",
            "Adapters (LoRA) of the model.",
            Use.ENGINE | Use.OPENAI_REQUEST,
            none_shown_as=(),
        ),
    ]
    precision: Annotated[str, Param("precision", "The number format that the model computes in.")]
    determinism: Annotated[
        str,
        Param(
            "determinism",
            "`reproducible`: the same parameters give the same pixels on the same class of device.",
            Use.ENGINE,
        ),
    ]
    bucket_rows: Annotated[
        int | None,
        Param(
            "bucket_rows",
            "The fixed number of rows of its batch, if it is reproducible.",
            Use.ENGINE,
            unit="rows",
        ),
    ]


def _listed() -> tuple[Param, ...]:
    hints = get_type_hints(Resolved, include_extras=True)
    listed = []
    for field in fields(Resolved):
        kind, note = get_args(hints[field.name])
        listed.append(replace(note, name=field.name, kind=kind))
    return tuple(listed)


PARAMS = _listed()
NAMES = tuple(param.name for param in PARAMS)  # the columns of `jobs` that make it replayable
ASKED = tuple(field.name for field in fields(RequestedParams))  # fields of a request
SHOWN = tuple(param for param in PARAMS if param.member is not None)
OPENAI_REQUEST = tuple(param for param in PARAMS if Use.OPENAI_REQUEST in param.use)
OPENAI_ANSWER = tuple(param for param in PARAMS if Use.OPENAI_ANSWER in param.use)
# By their role in a job.
PICTURES: Mapping[str, Param] = {
    param.member: param for param in PARAMS if param.picture and param.member
}


def params_of(source: object) -> Resolved:
    """Read every parameter from attributes of the same names, as of a job's row."""
    return Resolved(**{name: getattr(source, name) for name in NAMES})


def members_of(source: object, params: Iterable[Param] = SHOWN) -> dict[str, Any]:
    """Show parameters as clients know them, in JSON's types; `size` is not among them."""
    return {param.member: _shown(param, source) for param in params if param.member is not None}


def pictures_of(source: object) -> dict[str, UUID]:
    """Give the files that a job starts from, by their role in it."""
    named = {role: getattr(source, param.name) for role, param in PICTURES.items()}
    return {role: file_id for role, file_id in named.items() if file_id is not None}


def size_of(source: Any) -> str:
    """Write width and height as requests and answers do."""
    return f"{source.width_px}x{source.height_px}"


def _shown(param: Param, source: object) -> Any:
    value = getattr(source, param.name)
    if value is None:
        return param.none_shown_as
    return str(value) if isinstance(value, UUID) else value
