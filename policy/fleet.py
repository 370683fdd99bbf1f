"""Parse fleet.toml to a typed value: tiers, models, pools.

Pure: it is handed the text; `settings.py` reads the file. Errors name the key that is wrong.
"""

import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from functools import cached_property
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from policy.sources import FETCHED_SUFFIXES, is_fetched, remote_source

# Of tiers, pools, samplers: they become names of queues, whose parts a dot divides.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
# An argument of a diffusers pipeline's call; some begin with an underscore.
OptionName = Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_]{0,62}$")]
OptionValue = str | int | float | bool
# Ids that other programs have built in.
ModelAlias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}$")]
MAX_SIDE_PX = 4096
# Those that the engine has.
Family = Literal["sd", "sdxl", "sd3", "flux", "pipeline", "plain"]
# What a model is computed in.
Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
# Bits of the weights of linear layers; they are computed with in the model's precision.
Quantisation = Literal["int8", "float8"]
QUANTISATIONS: tuple[str, ...] = get_args(Quantisation)
# Whose transformer can leave out later blocks.
BLOCK_CACHE_FAMILIES: tuple[Family, ...] = ("sd3", "flux")
# Arguments of its pipeline's call that a native family takes as options of the model.
OPTIONS_OF: Mapping[Family, tuple[str, ...]] = {
    "sd3": ("max_sequence_length",),
    "flux": ("max_sequence_length", "true_cfg_scale"),
}
# Any diffusers pipeline: what it makes of its arguments is not known here.
OPEN_FAMILIES: tuple[Family, ...] = ("pipeline", "plain")


class FleetInvalid(Exception):
    """fleet.toml cannot be used; `problems` holds one line per wrong key."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def parse_size(text: str) -> tuple[int, int]:
    """Parse `"512x768"` to (width_px, height_px).

    Raises ValueError, which says what is accepted.
    """
    width, separator, height = text.partition("x")
    is_width = width.isascii() and width.isdigit()
    is_height = height.isascii() and height.isdigit()
    if not (separator and is_width and is_height and len(text) <= 11):
        raise ValueError('a size is "WIDTHxHEIGHT" in pixels, such as "512x512"')
    width_px = int(width)
    height_px = int(height)
    in_range = 8 <= width_px <= MAX_SIDE_PX and 8 <= height_px <= MAX_SIDE_PX
    if not in_range or width_px % 8 or height_px % 8:
        raise ValueError(f"both sides must be multiples of 8 from 8 to {MAX_SIDE_PX}")
    return width_px, height_px


def _checked_size(text: str) -> str:
    parse_size(text)
    return text


Size = Annotated[str, AfterValidator(_checked_size)]


def _checked_model_name(text: str) -> str:
    """Return the name of a model, version or adapter: as its makers call it, "FLUX.1-dev"."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", text):
        raise ValueError("a name has letters, digits, '.', '_' and '-', at most 63 of them")
    return text


ModelName = Annotated[str, AfterValidator(_checked_model_name)]
VERSION_MARK = "@"  # between the names of a model and of its version


def _checked_pool_model(text: str) -> str:
    """Return the name of a model, or of one version of it: "sdxl@v2"."""
    for part in text.split(VERSION_MARK, 1):
        _checked_model_name(part)
    return text


PoolModel = Annotated[str, AfterValidator(_checked_pool_model)]
MAX_ADAPTERS = 8
MAX_ADAPTER_STRENGTH = 4.0


def checkpoint_name(model: str, version: str) -> str:
    """Name the weights of one version as the engine does."""
    return f"{model}{VERSION_MARK}{version}"


def _checked_source(text: str) -> str:
    remote_source(text)
    return text


Source = Annotated[str, StringConstraints(min_length=1), AfterValidator(_checked_source)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy the table, without what was derived from its values and is kept."""
        copy = super().model_copy(update=update, deep=deep)
        for derived in copy.__dict__.keys() - type(self).model_fields:
            del copy.__dict__[derived]
        return copy


class Slo(_Table):
    """The part of a tier's jobs that is to be served as its objectives say."""

    first_preview: float = Field(0.95, gt=0, lt=1)  # a first preview within `first_preview_s`
    final: float = Field(0.95, gt=0, lt=1)  # all images stored within `final_s`
    success: float = Field(0.999, gt=0, lt=1)  # neither failed by a fault of ours nor expired
    eta: float = Field(0.9, gt=0, lt=1)  # over before the 90 % estimate that was given at accept

    def targets(self) -> dict[str, float]:
        """Return the parts by the name of their objective."""
        return {name: getattr(self, name) for name in type(self).model_fields}


class Tier(_Table):
    """A class of service. `rank` 0 is served first."""

    rank: int = Field(ge=0, le=99)
    max_steps: int = Field(ge=1, le=1000)
    default_steps: int = Field(ge=1)
    max_images: int = Field(ge=1, le=64)
    max_megapixels: float = Field(16.8, gt=0)
    guaranteed_share: float = Field(ge=0, lt=1)
    first_preview_s: float = Field(gt=0)
    final_s: float = Field(gt=0)
    slo: Slo = Slo()
    determinism: Literal["best_effort", "reproducible"]
    price_weight: float = Field(gt=0)
    start_within_s: int = Field(ge=1)
    # From the first start to the last pixels, storing not counted; then the job fails.
    run_within_s: float = Field(3600.0, gt=0)
    # Steps of each image that a killed worker loses at most; 0: all of them.
    checkpoint_every_steps: int = Field(10, ge=0)
    # After a job's end its prompts and images are erased; None: kept.
    retention_days: int | None = Field(None, ge=1)
    # Images announced or running; None: as many as there is room for.
    max_in_hand_per_tenant: int | None = Field(None, ge=1)
    # Device seconds that one tenant may have waiting; more is a 429.
    max_queued_s_per_tenant: float = Field(86_400.0, gt=0)


class TierAdapter(_Table):
    """An adapter that every image of a model in a tier has, unless it asks for another strength."""

    name: ModelName
    strength: float = Field(1.0, ge=-MAX_ADAPTER_STRENGTH, le=MAX_ADAPTER_STRENGTH)


class ModelTier(_Table):
    """The settings of one model in one tier, where they differ from the model's or the tier's."""

    # Renders the jobs that name no version; None: one that is drawn.
    version: ModelName | None = None
    default_sampler: Name | None = None
    default_steps: int | None = Field(None, ge=1)
    default_guidance: float | None = Field(None, ge=0)
    adapters: tuple[TierAdapter, ...] = Field((), max_length=MAX_ADAPTERS)
    # Size -> rows of every forward of a reproducible request.
    bucket_rows: dict[Size, int] = Field(default_factory=dict)
    block_cache: bool = True  # false: jobs of this tier compute every block


class ModelVersion(_Table):
    """One set of weights. `traffic_weight` 0: it is loaded when a job names it.

    precision, licence, options: None where they are the model's.
    """

    id: ModelName
    source: Source
    traffic_weight: float = Field(1.0, ge=0)
    precision: Precision | None = None
    quantize: Quantisation | None = None  # None: no weight is
    licence: str | None = None
    options: dict[OptionName, OptionValue] | None = None
    sha256: dict[str, Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]] = Field(
        default_factory=dict
    )


class Adapter(_Table):
    """Low-rank weights that may be laid over every version of a model: one safetensors file."""

    source: Source
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Model(_Table):
    """An entry of the catalog: what clients may ask of one family of weights."""

    title: str
    # Further ids that a request may say; its jobs are this model's.
    aliases: tuple[ModelAlias, ...] = ()
    family: Family
    # Families pipeline and plain: the diffusers class; "": the one that the checkpoint names.
    pipeline_class: str = ""
    # Families pipeline and plain: arguments of every call; of sd3 and flux see OPTIONS_OF.
    options: dict[OptionName, OptionValue] = Field(default_factory=dict)
    adapters: dict[ModelName, Adapter] = Field(default_factory=dict)
    # The largest rank of an adapter; device memory grows with it only where one has it.
    max_adapter_rank: int = Field(64, ge=1, le=1024)
    # Different adapters in one forward; at least as many as one request may name.
    adapter_slots: int = Field(8, ge=8, le=256)
    channels_last: bool = False
    vae_tf32: bool = True  # sdxl in half precision on a GPU
    compile_blocks: bool = False
    cuda_graphs: bool = False
    block_cache_threshold: float = Field(0.0, ge=0, lt=1)  # 0: no block cache; sd3 and flux alone
    licence: str = "unknown"
    precision: Precision
    # Family flux: the network takes guidance as an input (dev); false: it does not (schnell).
    guidance_distilled: bool = True
    sizes: tuple[Size, ...] = Field(min_length=1)  # the first is the default
    samplers: tuple[Name, ...] = Field(min_length=1)
    default_sampler: Name
    default_guidance: float = Field(ge=0)
    max_guidance: float = Field(gt=0)
    max_prompt_chars: int = Field(2000, ge=1, le=100_000)
    # The count of its megapixel-step against budgets and quotas.
    cost_factor: float = Field(1.0, gt=0, le=1000)
    created_at: datetime = datetime.fromtimestamp(0, UTC)  # 1970: nobody said
    tiers: dict[Name, ModelTier] = Field(default_factory=dict)
    versions: tuple[ModelVersion, ...] = Field(min_length=1)

    @cached_property
    def as_served(self) -> dict[str, "Model"]:
        """Map the id of each version to the model with what that version says of its own."""
        return {version.id: self._with(version) for version in self.versions}

    def version(self, version_id: str) -> ModelVersion:
        """Find one of its versions. Raises StopIteration where it has none of that id."""
        return next(version for version in self.versions if version.id == version_id)

    def of_version(self, version: str) -> "Model":
        """Return the model as this version serves it; as it is if the version is gone."""
        return self.as_served.get(version, self)

    def _with(self, version: ModelVersion) -> "Model":
        said = {
            "precision": version.precision,
            "licence": version.licence,
            "options": version.options,
        }
        own = {name: value for name, value in said.items() if value is not None}
        return self.model_copy(update=own) if own else self


Market = Literal["on_demand", "reserved", "spot"]  # how a device is rented


class CapacityClass(_Table):
    """Devices of one kind in a pool; None is what the pool says."""

    market: Market | None = None
    gpu_class: str | None = None
    gpu_hour_price: float | None = Field(None, ge=0)
    slots: int | None = Field(None, ge=1, le=1024)


class Pool(_Table):
    """Models that live together on a worker; a failure domain."""

    models: tuple[PoolModel, ...] = Field(min_length=1)  # "sdxl@v2": one version alone
    tenants: tuple[str, ...] = ()  # by name, for whom it is reserved; (): for nobody
    tiers: tuple[Name, ...] = ()  # whose jobs it takes; (): of all
    # The pool to which jobs go that waited so long here, when it has room.
    overflow_to: Name | None = None
    overflow_after_s: float | None = Field(None, gt=0)
    slots: int = Field(ge=1, le=1024)  # images resident on one device
    max_batch_rows: int = Field(ge=1, le=1024)
    # Sizes of best-effort forwards, ascending; (): exactly the rows there are; None: doublings on
    # a GPU, () on a CPU.
    row_buckets: tuple[int, ...] | None = None
    attention: Literal["auto", "flash", "efficient", "cudnn", "math"] = "auto"
    fp16_accumulation: bool = False  # GPUs alone
    # Which of its models are in a device's memory: all of them, or those used last that fit.
    residency: Literal["all", "lru"] = "all"
    # With lru: memory for weights; None: most of what the device has free. A CPU needs a number.
    device_memory_gb: float | None = Field(None, gt=0)
    # With lru on a GPU: host memory for copies of weights that left the device.
    host_memory_gb: float = Field(0.0, ge=0)
    # With lru: a job waits so long for its model before one that others need gives way.
    swap_after_s: float = Field(10.0, ge=0)
    warm_floor: int = Field(0, ge=0)
    # An autoscaler starts workers when jobs wait; without one and without a live worker jobs are
    # refused.
    scalable: bool = False
    market: Market | None = None  # None: nobody said
    # Words that the name of each worker's device must have; "any": it may be every device.
    gpu_class: str = Field("any", min_length=1)
    gpu_hour_price: float = Field(0.0, ge=0)
    classes: dict[Name, CapacityClass] = Field(default_factory=dict)

    def class_of(self, said: str) -> str:
        """Name the class of a worker that says this; "" if it says nothing and is of none.

        One that says nothing is of the only class, if there is one only.
        """
        return said or (next(iter(self.classes)) if len(self.classes) == 1 else "")

    def of_class(self, capacity_class: str) -> "Pool":
        """Return the pool as a worker of this class has it; as it is for "" and a class gone."""
        said = self.classes.get(capacity_class)
        own = {} if said is None else said.model_dump(exclude_none=True)
        return self.model_copy(update=own) if own else self


# Stand-ins for entries that the catalogue no longer has, for jobs that were accepted under them.
# Such jobs are served first, cost no more than their device time, are counted by the plain
# megapixel-step, and get nothing that only a tier can ask for.
RETIRED_TIER = Tier(
    rank=0,
    max_steps=1,
    default_steps=1,
    max_images=1,
    guaranteed_share=0.0,
    first_preview_s=1.0,
    final_s=1.0,
    determinism="best_effort",
    price_weight=1.0,
    start_within_s=1,
    checkpoint_every_steps=0,
)
RETIRED_POOL = Pool(models=("retired",), slots=1, max_batch_rows=1, gpu_hour_price=0.0)
RETIRED_MODEL = Model(
    title="Retired",
    family="sd",
    licence="",
    precision="fp32",
    sizes=("8x8",),
    samplers=("none",),
    default_sampler="none",
    default_guidance=1.0,
    max_guidance=1.0,
    cost_factor=1.0,
    created_at=datetime.fromtimestamp(0, UTC),
    versions=(ModelVersion(id="retired", source="none"),),
)


class Fleet(_Table):
    """The whole file, cross-checked."""

    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")] = "USD"
    tiers: dict[Name, Tier] = Field(min_length=1)
    models: dict[ModelName, Model] = Field(min_length=1)
    pools: dict[Name, Pool] = Field(min_length=1)

    @cached_property
    def tiers_by_rank(self) -> tuple[str, ...]:
        """Return tier names, the one served first in front."""
        return tuple(sorted(self.tiers, key=lambda name: self.tiers[name].rank))

    def tier_or_retired(self, name: str) -> Tier:
        """Find a tier; RETIRED_TIER if the catalogue no longer has it.

        Its accepted jobs must still end.
        """
        return self.tiers.get(name, RETIRED_TIER)

    def pool_or_retired(self, name: str) -> Pool:
        """Find a pool; RETIRED_POOL if the catalogue no longer has it."""
        return self.pools.get(name, RETIRED_POOL)

    def model_or_retired(self, name: str) -> Model:
        """Find a model; RETIRED_MODEL if the catalogue no longer has it."""
        return self.models.get(name, RETIRED_MODEL)

    def queue_tier(self, name: str) -> str:
        """Name the tier whose queues take the work of tier `name`.

        Its own, or the last in rank if the catalogue no longer has it.
        """
        return name if name in self.tiers else self.tiers_by_rank[-1]

    def pools_of(self, model: str) -> tuple[str, ...]:
        """Name the pools that serve a version of `model`, in the file's order."""
        return tuple(
            pool
            for pool, versions in self._versions_by_pool.items()
            if any(served == model for served, _ in versions)
        )

    def versions_in(self, pool: str) -> dict[tuple[str, str], None]:
        """List (model, version) of all that a pool serves, in the order of the models' tables."""
        return self._versions_by_pool[pool]

    def checkpoints_in(self, pool: str) -> frozenset[str]:
        """Name the weights that a pool serves, as the engine does."""
        return frozenset(checkpoint_name(*version) for version in self.versions_in(pool))

    @cached_property
    def _versions_by_pool(self) -> dict[str, dict[tuple[str, str], None]]:
        return {
            name: {
                (model, version.id): None
                for model, entry in self.models.items()
                for version in entry.versions
                if {model, checkpoint_name(model, version.id)} & set(pool.models)
            }
            for name, pool in self.pools.items()
        }

    @cached_property
    def model_ids(self) -> dict[str, str]:
        """Map every name that a request may give a model to the id of that model.

        The ids themselves in front, then the aliases.
        """
        aliases = {
            alias: model_id for model_id, model in self.models.items() for alias in model.aliases
        }
        return {model_id: model_id for model_id in self.models} | aliases

    def default_steps(self, model: str, tier: str) -> int:
        """Return the denoise steps of a request that names none."""
        own = self.models[model].tiers.get(tier, ModelTier())
        return own.default_steps or self.tiers[tier].default_steps

    def sizes_of(self, model: str, tier: str) -> tuple[str, ...]:
        """List the sizes of `model` within the limit of `tier`, the default in front."""
        most_px = self.tiers[tier].max_megapixels * 1e6
        return tuple(
            size for size in self.models[model].sizes if math.prod(parse_size(size)) <= most_px
        )

    def default_model(self) -> str:
        """Name the model of a request that names none: the first of the file."""
        return next(iter(self.models))

    def default_tier(self) -> str:
        """Name the tier of a request that names none: the first of the file."""
        return next(iter(self.tiers))


def parse_fleet(text: str) -> Fleet:
    """Parse and cross-check the text of fleet.toml. Raises FleetInvalid."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FleetInvalid([f"not TOML: {error}"]) from None
    if problems := list(_unquoted_names(tables)):
        raise FleetInvalid(problems)
    try:
        fleet = Fleet.model_validate(tables)
    except ValidationError as error:
        raise FleetInvalid(
            [
                f"{_key(*problem['loc'])}: {problem['msg'].removeprefix('Value error, ')}"
                for problem in error.errors()
            ]
        ) from None
    if problems := list(_contradictions(fleet)):
        raise FleetInvalid(problems)
    return fleet


def toml_key(name: str) -> str:
    """Write one part of a key of a TOML file: quoted where it is no bare one."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _key(*parts: str | int) -> str:
    """Write the whole key of a table or value, as the file's reader would."""
    marks = ("[key]",)  # pydantic's word for the key itself
    return ".".join(
        part if part in marks else toml_key(part) if isinstance(part, str) else str(part)
        for part in parts
    )


def _unquoted_names(tables: Mapping[str, Any]) -> Iterator[str]:
    """Tell of names with a dot that are not quoted, which TOML reads as tables within tables."""
    models = tables.get("models")
    if not isinstance(models, dict):
        return
    yield from _unquoted("models", models, Model)
    for name, model in models.items():
        adapters = model.get("adapters") if isinstance(model, dict) else None
        if isinstance(adapters, dict):
            yield from _unquoted(_key("models", name, "adapters"), adapters, Adapter)


def _unquoted(place: str, entries: Mapping[str, Any], table: type[BaseModel]) -> Iterator[str]:
    """Do so for the tables of one kind, each of which is expected directly under `place`."""
    for name, entry in entries.items():
        for dotted in _dotted(name, entry, table.model_fields):
            yield f"{place}.{dotted}: a name with a dot is quoted: [{place}.{json.dumps(dotted)}]"


def _dotted(name: str, entry: Any, fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield every dotted name that leads to an entry with one of the fields."""
    if not isinstance(entry, dict):
        return
    for key, below in entry.items():
        if key not in fields and isinstance(below, dict):
            if fields.keys() & below.keys():
                yield f"{name}.{key}"
            else:
                yield from _dotted(f"{name}.{key}", below, fields)


def _contradictions(fleet: Fleet) -> list[str]:
    """List contradictions between tables, which no table alone shows."""
    problems = _contradictions_between_tiers(fleet)
    if "results" in fleet.pools:
        problems.append("pools.results: the name belongs to the results queues; choose another")
    if "front" in fleet.tiers:
        problems.append("tiers.front: the name belongs to the front queues; choose another")
    for name, pool in fleet.pools.items():
        problems += _contradictions_of_pool(fleet, name, pool)
    aliases = [alias for model in fleet.models.values() for alias in model.aliases]
    said = Counter([*fleet.models, *aliases])
    for name, model in fleet.models.items():
        problems += [
            f"{_key('models', name)}.aliases: {alias!r} is taken"
            for alias in model.aliases
            if said[alias] > 1
        ]
        problems += _contradictions_of_model(fleet, name, model)
    return problems


def _contradictions_between_tiers(fleet: Fleet) -> list[str]:
    problems = []
    ranks = Counter(tier.rank for tier in fleet.tiers.values())
    for name, tier in fleet.tiers.items():
        if ranks[tier.rank] > 1:
            problems.append(f"tiers.{name}.rank: {tier.rank} is taken by another tier")
        if tier.default_steps > tier.max_steps:
            problems.append(
                f"tiers.{name}.default_steps: must not exceed max_steps ({tier.max_steps})"
            )
    if sum(tier.guaranteed_share for tier in fleet.tiers.values()) >= 1:
        problems.append("tiers.*.guaranteed_share: the shares must add up to less than 1")
    return problems


def _contradictions_of_pool(fleet: Fleet, name: str, pool: Pool) -> list[str]:
    served = {*fleet.models, *(checkpoint_name(*each) for each in fleet.versions_in(name))}
    problems = [
        f"pools.{name}.models: {model!r} is not a model of this file, nor a version of one"
        for model in pool.models
        if model not in served
    ]
    problems += _contradictions_of_routes(fleet, name, pool)
    buckets = pool.row_buckets or ()
    possible = {rows for rows in buckets if 0 < rows <= pool.max_batch_rows}
    if list(buckets) != sorted(possible):
        problems.append(
            f"pools.{name}.row_buckets: must be ascending numbers from 1 to max_batch_rows"
            f" ({pool.max_batch_rows})"
        )
    problems += _too_few_rows(fleet, name, pool)
    if pool.row_buckets == ():
        problems += [
            f"pools.{name}.row_buckets: {model!r} records each forward pass (cuda_graphs), so name"
            f" some sizes, or leave the key out"
            for model in dict.fromkeys(model for model, _ in fleet.versions_in(name))
            if fleet.models[model].cuda_graphs
        ]
    if pool.residency == "all":
        problems += [
            f"pools.{name}.{key}: means something with residency 'lru' alone"
            for key in ("device_memory_gb", "host_memory_gb", "swap_after_s")
            if key in pool.model_fields_set
        ]
    slots = {"slots": pool.slots} | {
        f"classes.{capacity_class}.slots": pool.of_class(capacity_class).slots
        for capacity_class in pool.classes
    }
    problems += [
        f"pools.{name}.{key}: {number} is less than tiers.{tier_name}.max_images"
        f" ({tier.max_images})"
        for key, number in slots.items()
        for tier_name, tier in fleet.tiers.items()
        if tier.max_images > number
    ]
    return problems


def _too_few_rows(fleet: Fleet, name: str, pool: Pool) -> list[str]:
    """Tell where a guided image of a model does not fit into a forward of its pool.

    What a pipeline makes of guidance is not known here; its workers say it.
    """
    needed = {
        model: most_rows_of_an_image(fleet.models[model])
        for model, _ in fleet.versions_in(name)
        if fleet.models[model].family not in OPEN_FAMILIES
    }
    return [
        f"pools.{name}.max_batch_rows: an image of model {model!r} with guidance takes {rows} rows;"
        f" accepted: {rows} to 1024"
        for model, rows in needed.items()
        if rows > pool.max_batch_rows
    ]


def _contradictions_of_routes(fleet: Fleet, name: str, pool: Pool) -> list[str]:
    """Tell where a pool takes jobs from, or sends them to, that are not there."""
    problems = [
        f"pools.{name}.tiers: {tier!r} is not a tier of this file; accepted:"
        f" {', '.join(fleet.tiers)}"
        for tier in pool.tiers
        if tier not in fleet.tiers
    ]
    if (pool.overflow_to is None) != (pool.overflow_after_s is None):
        problems.append(f"pools.{name}.overflow_to: goes together with overflow_after_s")
    others = [
        other
        for other in fleet.pools
        if other != name and fleet.checkpoints_in(other) & fleet.checkpoints_in(name)
    ]
    if pool.overflow_to is not None and pool.overflow_to not in others:
        problems.append(
            f"pools.{name}.overflow_to: {pool.overflow_to!r} is not another pool with one of its"
            f" models; accepted: {', '.join(others) or 'none'}"
        )
    elif pool.overflow_to is not None and fleet.pools[pool.overflow_to].overflow_to is not None:
        problems.append(
            f"pools.{name}.overflow_to: {pool.overflow_to!r} passes jobs on itself; a job is moved"
            " once"
        )
    return problems


def _contradictions_of_model(fleet: Fleet, name: str, model: Model) -> list[str]:
    place = _key("models", name)
    problems = []
    if not fleet.pools_of(name):
        problems.append(f"{place}: must be in a pool, is in none")
    if model.default_sampler not in model.samplers:
        problems.append(f"{place}.default_sampler: must be one of samplers")
    if model.pipeline_class and model.family not in OPEN_FAMILIES:
        problems.append(f"{place}.pipeline_class: means nothing to family {model.family!r}")
    problems += _meaningless_options(place, model)
    problems += _unfetchable(place, model)
    if not model.guidance_distilled and model.family != "flux":
        problems.append(f"{place}.guidance_distilled: means nothing to family {model.family!r}")
    if model.block_cache_threshold and model.family not in BLOCK_CACHE_FAMILIES:
        problems.append(f"{place}.block_cache_threshold: means nothing to family {model.family!r}")
    if model.default_guidance > model.max_guidance:
        problems.append(
            f"{place}.default_guidance: must not exceed max_guidance ({model.max_guidance})"
        )
    if len({version.id for version in model.versions}) < len(model.versions):
        problems.append(f"{place}.versions: ids must differ")
    if not any(version.traffic_weight for version in model.versions):
        problems.append(f"{place}.versions: no version has a traffic_weight above 0")
    return problems + _contradictions_of_tiers(fleet, name, model)


def _meaningless_options(place: str, model: Model) -> list[str]:
    """Tell of options, the model's and its versions', that the family does not take."""
    if model.family in OPEN_FAMILIES:
        return []
    options = {f"{place}.options": model.options}
    for nth, version in enumerate(model.versions):
        options[f"{place}.versions.{nth}.options"] = version.options or {}
    return [
        f"{key}.{option}: means nothing to family {model.family!r}"
        for key, given in options.items()
        for option in given
        if option not in OPTIONS_OF.get(model.family, ())
    ]


def _unfetchable(place: str, model: Model) -> list[str]:
    """Tell of versions kept elsewhere whose files are not all named, or are never fetched."""
    problems = []
    for nth, version in enumerate(model.versions):
        key = f"{place}.versions.{nth}.sha256"
        if remote_source(version.source) is None:
            continue
        if not version.sha256:
            problems.append(
                f"{key}: is missing: of {version.source} only files with a digest are fetched;"
                " `./darkroom models add` writes them"
            )
        problems += [
            f"{key}.{toml_key(name)}: is never fetched; accepted: paths below the source that end"
            f" in {', '.join(FETCHED_SUFFIXES)}"
            for name in version.sha256
            if not is_fetched(name)
        ]
    problems += [
        f"{place}.adapters.{toml_key(name)}.source: names no .safetensors file"
        for name, adapter in model.adapters.items()
        if (remote := remote_source(adapter.source)) is not None
        and not remote.path.endswith(".safetensors")
    ]
    return problems


def _contradictions_of_tiers(fleet: Fleet, name: str, model: Model) -> list[str]:
    """Tell where the model and the tiers do not fit each other."""
    place = _key("models", name)
    problems = []
    for tier_name, own in model.tiers.items():
        problems += _contradictions_of_variant(f"{place}.tiers.{tier_name}", model, own)
        problems += _unserved_version(fleet, name, tier_name, own)
        if tier_name not in fleet.tiers:
            problems.append(f"{place}.tiers.{tier_name}: not a tier of this file")
        elif own.default_steps is not None and own.default_steps > fleet.tiers[tier_name].max_steps:
            problems.append(
                f"{place}.tiers.{tier_name}.default_steps: exceeds the tier's max_steps"
            )
        if own.default_guidance is not None and own.default_guidance > model.max_guidance:
            problems.append(
                f"{place}.tiers.{tier_name}.default_guidance: exceeds max_guidance"
                f" ({model.max_guidance})"
            )
    for tier_name, tier in fleet.tiers.items():
        if not fleet.sizes_of(name, tier_name):
            problems.append(f"tiers.{tier_name}.max_megapixels: no size of model {name!r} fits")
        if tier.determinism == "reproducible":
            problems += _contradictions_of_bucket_rows(fleet, name, model, tier_name)
    return problems


def _contradictions_of_variant(place: str, model: Model, own: ModelTier) -> list[str]:
    """Tell of what a tier chooses and the model has not."""
    chosen: list[tuple[str, str | None, Collection[str]]] = [
        ("version", own.version, model.as_served),
        ("default_sampler", own.default_sampler, model.samplers),
        *(("adapters", adapter.name, model.adapters) for adapter in own.adapters),
    ]
    names = Counter(adapter.name for adapter in own.adapters)
    return [
        f"{place}.{key}: {value!r} is not of this model; accepted: {', '.join(accepted) or 'none'}"
        for key, value, accepted in chosen
        if value is not None and value not in accepted
    ] + [f"{place}.adapters: {name!r} is named twice" for name in names if names[name] > 1]


def _unserved_version(fleet: Fleet, name: str, tier: str, own: ModelTier) -> list[str]:
    """Tell of a version that a tier chooses and no pool renders in that tier, for anybody."""
    served = [
        version
        for pool, shape in fleet.pools.items()
        if not shape.tiers or tier in shape.tiers
        for model, version in fleet.versions_in(pool)
        if model == name
    ]
    is_known = own.version in fleet.models[name].as_served and tier in fleet.tiers
    if not is_known or own.version in served:
        return []
    accepted = ", ".join(dict.fromkeys(served)) or "none"
    return [
        f"{_key('models', name)}.tiers.{tier}.version: no pool renders {own.version!r} in tier"
        f" {tier}, so nobody could use it; accepted: {accepted}"
    ]


def _contradictions_of_bucket_rows(
    fleet: Fleet, name: str, model: Model, tier_name: str
) -> list[str]:
    place = _key("models", name)
    bucket_rows = model.tiers.get(tier_name, ModelTier()).bucket_rows
    rows_limit = min((fleet.pools[pool].max_batch_rows for pool in fleet.pools_of(name)), default=0)
    least_rows = most_rows_of_an_image(model)
    return [
        f"{place}.tiers.{tier_name}.bucket_rows: {size!r} needs {least_rows} to"
        f" {rows_limit} rows, for tier {tier_name} is reproducible"
        for size in model.sizes
        if not least_rows <= bucket_rows.get(size, 0) <= rows_limit
    ]


def most_rows_of_an_image(model: Model) -> int:
    """Return how many rows of a forward an image of this model takes at most.

    Guidance takes a second one, unless the network takes it as an input, or it never acts.
    """
    if model.family == "flux" and model.guidance_distilled:
        scales = map(true_cfg_scale, model.as_served.values())
        return 2 if max(scales, default=1.0) > 1 else 1
    is_never_guided = model.family not in OPEN_FAMILIES and model.max_guidance <= 1
    return 1 if is_never_guided else 2


def true_cfg_scale(model: Model) -> float:
    """Return the scale of classifier-free guidance that a distilled network gets on top; 1: none.

    What is no number the worker refuses when it loads the model.
    """
    scale = model.options.get("true_cfg_scale", 1.0)
    return float(scale) if isinstance(scale, int | float) else 1.0
