"""Describe a job's fields and their bounds, by what is enforced and what fleet.toml offers."""

from typing import Any

from app.schemas.bodies import MAX_METADATA_CHARS, MAX_METADATA_KEY_CHARS, MAX_METADATA_KEYS
from policy.catalog import MAX_ADAPTERS, MAX_SEED, RANDOM_SEED
from policy.fleet import Fleet
from policy.params import ASKED, PARAMS, Param

ABOUT = {
    "prompt": "What the images show. It may be empty where `init_image` says it all.",
    "negative_prompt": "What they do not show.",
    "model": "A model, by its id or another name; `GET /v1/models` lists them.",
    "tier": "The class of service; `GET /v1/tiers` lists them.",
    "size": "Width and height in pixels; by default the model's first one.",
    "steps": "Denoise steps of each image; by default those of the model in the tier.",
    "guidance": "How closely the images follow the prompt; by default the model's.",
    "sampler": "The sampling method; by default the model's.",
    "seed": f"The seed of image 0; {RANDOM_SEED} or none: one is drawn, and the answer says which.",
    "n": "How many images.",
    "init_image": "The picture to start from: the id of a file, a data URL or, if you may, a URL.",
    "mask": "What of `init_image` is painted anew: where it is transparent, or else white.",
    "control_image": "The picture that a control network follows. Said as `init_image` is.",
    "strength": "How far from `init_image`: 1 leaves nothing of it.",
    "adapters": "Adapters of the model, and how much of each.",
    "metadata": "Your own; `GET /v1/jobs?metadata.<key>=<value>` finds it.",
    "start_deadline_s": "Seconds within which a worker must begin; at most those of the tier.",
}


def job_fields(fleet: Fleet) -> dict[str, dict[str, Any]]:
    """Return JSON Schema keywords by the names of a job's fields; every accepted value fits."""
    models, tiers = fleet.models.values(), fleet.tiers.values()
    longest_prompt = max(model.max_prompt_chars for model in models)
    bounds: dict[str, dict[str, Any]] = {
        "prompt": {"maxLength": longest_prompt},
        "negative_prompt": {"maxLength": longest_prompt},
        "model": {"enum": list(fleet.model_ids)},
        "tier": {"enum": list(fleet.tiers)},
        "size": {"enum": sorted({size for model in models for size in model.sizes})},
        "steps": {"minimum": 1, "maximum": max(tier.max_steps for tier in tiers)},
        "guidance": {"minimum": 0, "maximum": max(model.max_guidance for model in models)},
        "sampler": {"enum": sorted({sampler for model in models for sampler in model.samplers})},
        "seed": {"minimum": RANDOM_SEED, "maximum": MAX_SEED - 1},
        "n": {"minimum": 1, "maximum": max(tier.max_images for tier in tiers)},
        "strength": {"exclusiveMinimum": 0, "maximum": 1},
        "adapters": {"maxItems": MAX_ADAPTERS},
        "metadata": {
            "maxProperties": MAX_METADATA_KEYS,
            "propertyNames": {"minLength": 1, "maxLength": MAX_METADATA_KEY_CHARS},
            "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_CHARS},
        },
        "start_deadline_s": {
            "exclusiveMinimum": 0,
            "maximum": max(tier.start_within_s for tier in tiers),
        },
    }
    pass_through = {
        param.member: {"description": param.says} | _bounds(param)
        for param in PARAMS
        if param.member in ASKED
    }
    said = {name: {"description": about} | bounds.get(name, {}) for name, about in ABOUT.items()}
    return pass_through | said


def _bounds(param: Param) -> dict[str, Any]:
    """Return range and choices of a parameter whose bounds do not depend on the model."""
    rule = param.pass_through
    if rule is None:
        return {}
    choices = None if rule.choices is None else list(rule.choices)
    given = {"enum": choices, "minimum": rule.low, "maximum": rule.high}
    return {keyword: bound for keyword, bound in given.items() if bound is not None}
