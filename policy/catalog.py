"""From a tenant's wish to parameters that say everything: resolved here, before anything is written.

Pure: no clock, no randomness of its own (the caller hands a seed and a draw), so a resolved job can be replayed from its row.
"""

from dataclasses import dataclass
from typing import TypeVar

from policy.fleet import Fleet, Model, ModelTier, ModelVersion, parse_size

MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps exact
OUTPUT_FORMATS = ("png", "webp", "jpeg")

Number = TypeVar("Number", int, float)
Value = TypeVar("Value")


class InvalidWish(Exception):
    """A field that no worker could ever render; `accepted` says what would be."""

    def __init__(self, field: str, detail: str, accepted: object = None) -> None:
        super().__init__(f"{field}: {detail}")
        self.field, self.detail, self.accepted = field, detail, accepted


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a tenant asked for, types already right; None = not said."""

    prompt: str
    negative_prompt: str = ""
    model: str | None = None
    tier: str | None = None
    size: str | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    seed: int | None = None
    n: int = 1
    output_format: str = "png"


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """Every parameter of a job; the same Resolved on the same device class gives the same image."""

    prompt: str
    negative_prompt: str
    model: str
    model_version: str
    pool: str
    tier: str
    width_px: int
    height_px: int
    num_steps: int
    guidance: float
    sampler: str
    seed: int  # of image 0; image i has seed + i
    num_images: int
    output_format: str
    precision: str
    determinism: str
    bucket_rows: int | None


def resolve(fleet: Fleet, wish: Wish, *, default_seed: int, draw: float) -> Resolved:
    """Fill in what was not said and refuse what cannot be served (InvalidWish, which names the field).

    default_seed: used when the wish names none.  draw: in [0, 1), picks the model version by traffic weight.
    """
    model_id = _one_of("model", _first(wish.model, fleet.default_model()), tuple(fleet.models))
    tier_id = _one_of("tier", _first(wish.tier, fleet.default_tier()), tuple(fleet.tiers))
    model, tier = fleet.models[model_id], fleet.tiers[tier_id]
    own = model.tiers.get(tier_id, ModelTier())
    _check_text(model, wish)
    sizes = fleet.sizes_of(model_id, tier_id)
    size = _one_of("size", _first(wish.size, sizes[0]), sizes)
    width_px, height_px = parse_size(size)
    num_images = _within("n", wish.n, 1, tier.max_images, f"tier {tier_id}")
    steps = _first(wish.steps, own.default_steps, tier.default_steps)
    guidance = _first(wish.guidance, own.default_guidance, model.default_guidance)
    seed = default_seed if wish.seed is None else wish.seed
    return Resolved(
        prompt=wish.prompt,
        negative_prompt=wish.negative_prompt,
        model=model_id,
        model_version=pick_version(model, draw).id,
        pool=fleet.pool_of(model_id),
        tier=tier_id,
        width_px=width_px,
        height_px=height_px,
        num_steps=_within("steps", steps, 1, tier.max_steps, f"tier {tier_id}"),
        guidance=_within("guidance", guidance, 0.0, model.max_guidance, f"model {model_id}"),
        sampler=_one_of("sampler", _first(wish.sampler, model.default_sampler), model.samplers),
        seed=_within("seed", seed, 0, MAX_SEED - num_images, "every model"),
        num_images=num_images,
        output_format=_one_of("output_format", wish.output_format, OUTPUT_FORMATS),
        precision=model.precision,
        determinism=tier.determinism,
        bucket_rows=own.bucket_rows[size] if tier.determinism == "reproducible" else None,
    )


def pick_version(model: Model, draw: float) -> ModelVersion:
    """The version that `draw` in [0, 1) falls on, by traffic weight."""
    offered = [version for version in model.versions if version.traffic_weight > 0]
    point = draw * sum(version.traffic_weight for version in offered)
    for version in offered:
        point -= version.traffic_weight
        if point < 0:
            return version
    return offered[-1]


def checkpoint_name(model: str, version: str) -> str:
    """How the engine calls the weights of one version."""
    return f"{model}@{version}"


def _check_text(model: Model, wish: Wish) -> None:
    for field, text in (("prompt", wish.prompt), ("negative_prompt", wish.negative_prompt)):
        if len(text) > model.max_prompt_chars:
            accepted = {"max_chars": model.max_prompt_chars}
            raise InvalidWish(field, f"has {len(text)} characters; at most {model.max_prompt_chars} are accepted", accepted)
        if "\x00" in text or any("\ud800" <= char <= "\udfff" for char in text):
            raise InvalidWish(field, "contains a NUL or a lone surrogate; plain Unicode text is accepted")
    if not wish.prompt.strip():
        raise InvalidWish("prompt", "is empty; describe the image", {"min_chars": 1})


def _one_of(field: str, value: str, accepted: tuple[str, ...]) -> str:
    if value not in accepted:
        raise InvalidWish(field, f"{value[:64]!r} is not offered; accepted: {', '.join(accepted)}", list(accepted))
    return value


def _within(field: str, value: Number, low: Number, high: Number, by: str) -> Number:
    if not low <= value <= high:
        raise InvalidWish(field, f"must be from {low} to {high} ({by})", {"min": low, "max": high})
    return value


def _first(*options: Value | None) -> Value:
    return next(option for option in options if option is not None)
