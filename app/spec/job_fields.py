"""Describe a job's fields and their bounds, by what is enforced and what fleet.toml offers."""

from typing import Any

from app.schemas.bodies import MAX_METADATA_CHARS, MAX_METADATA_KEY_CHARS, MAX_METADATA_KEYS
from policy.catalog import MAX_SEED, RANDOM_SEED
from policy.fleet import MAX_ADAPTERS, Fleet, checkpoint_name
from policy.offers import offer_of, offered_models, offered_names, offered_tiers
from policy.params import ASKED, PARAMS, Param
from policy.routing import Asker

ABOUT = {
    "prompt": "What the images show. It may be empty if `init_image` is given.",
    "negative_prompt": "What the images should not show.",
    "model": "The id or an alias of a model; `GET /v1/models` lists them. A key with the scope"
    " `versions` may name one of its versions, as `model@version`.",
    "tier": "The class of service; `GET /v1/tiers` lists them.",
    "size": "Width and height in pixels; by default the first size of the model.",
    "steps": "Denoise steps of each image; by default those of the model in the tier.",
    "guidance": "How closely the images follow the prompt; by default the model's value.",
    "sampler": "The sampling method; by default the model's.",
    "seed": "The seed of image 0; image i has seed + i. Without one, or with"
    f" {RANDOM_SEED}, a random seed is chosen, which the answer shows.",
    "n": "The number of images.",
    "init_image": "The picture to start from: the id of an uploaded file, a data URL or, if your"
    " tenant may use them, a URL.",
    "mask": "Which part of `init_image` is painted anew: where this picture is transparent or, if"
    " it has no transparent part, where it is white. Given like `init_image`.",
    "control_image": "The picture that the model's control network follows. Given like"
    " `init_image`.",
    "strength": "How much `init_image` is changed, above 0 and at most 1; at 1 nothing of it"
    " stays. Without one it is 0.8, or 1 with a mask; models of the families `pipeline` and `plain`"
    " decide it themselves, and edit models have none.",
    "adapters": "Adapters (LoRA) of the model, each with its strength.",
    "metadata": "Your own entries, kept with the job; `GET /v1/jobs?metadata.<key>=<value>` finds"
    " the job by one.",
    "start_deadline_s": "The job expires if no worker starts it within so many seconds. At most,"
    " and by default, the limit of the tier.",
}


def job_fields(fleet: Fleet, asker: Asker) -> dict[str, dict[str, Any]]:
    """Return JSON Schema keywords by the names of a job's fields.

    Every value fits that is accepted of this asker.
    """
    offered = offered_tiers(fleet, asker)
    # To somebody who is offered nothing, the limits of all are told, and no names.
    models = [fleet.models[name] for name in offered_models(fleet, asker) or fleet.models]
    tiers = [fleet.tiers[name] for name in offered or fleet.tiers]
    longest_prompt = max(model.max_prompt_chars for model in models)
    bounds: dict[str, dict[str, Any]] = {
        "prompt": {"maxLength": longest_prompt},
        "negative_prompt": {"maxLength": longest_prompt},
        "model": {"enum": _names_of_models(fleet, asker)},
        "tier": {"enum": list(offered)},
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


def _names_of_models(fleet: Fleet, asker: Asker) -> list[str]:
    """List what a request may call a model, and after these what it may call a version."""
    named = offered_names(fleet, asker)
    if not asker.may_name_versions:
        return list(named)
    offers = {model: offer_of(fleet, model, asker) for model in fleet.models}
    versions = [
        checkpoint_name(name, version)
        for name, model in fleet.model_ids.items()
        for version in offers[model].versions
    ]
    return list(dict.fromkeys([*named, *versions]))


def _bounds(param: Param) -> dict[str, Any]:
    """Return range and choices of a parameter whose bounds do not depend on the model."""
    rule = param.pass_through
    if rule is None:
        return {}
    choices = None if rule.choices is None else list(rule.choices)
    given = {"enum": choices, "minimum": rule.low, "maximum": rule.high}
    return {keyword: bound for keyword, bound in given.items() if bound is not None}
