"""/v1/models and /v1/tiers: what can be asked for, straight from fleet.toml."""

from typing import Any

from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue

from app.auth import caller, require_key
from app.gateway import gateway
from app.problems import ModelNotFound
from policy.fleet import Fleet, ModelTier
from policy.params import OUTPUT_FORMATS

bp = Blueprint("catalog", __name__, url_prefix="/v1")
bp.before_request(require_key)


@bp.get("/models")
def list_models() -> ResponseReturnValue:
    """OpenAI's list shape; our facts are extra members. Aliases come after the models, for programs that look for theirs in the list."""
    fleet = gateway().fleet
    return jsonify(object="list", data=[_model_view(fleet, name) for name in _usable_names(fleet)])


@bp.get("/models/<path:name>")
def show_model(name: str) -> ResponseReturnValue:
    """One model, by its id or an alias: sizes, samplers, versions, defaults by tier."""
    fleet = gateway().fleet
    usable = _usable_names(fleet)
    if name not in usable:
        raise ModelNotFound(f"There is no model {name[:64]!r}.", accepted=usable)
    return jsonify(_model_view(fleet, name))


@bp.get("/tiers")
def list_tiers() -> ResponseReturnValue:
    """Tiers in the order in which they are served."""
    fleet = gateway().fleet
    shown = (
        "rank",
        "max_steps",
        "default_steps",
        "max_images",
        "max_megapixels",
        "determinism",
        "price_weight",
        "start_within_s",
        "first_preview_s",
        "final_s",
    )
    tiers = [
        {"id": name, "object": "tier"} | {key: getattr(fleet.tiers[name], key) for key in shown}
        for name in fleet.tiers_by_rank
        if _may_use_tier(name)
    ]
    return jsonify(object="list", data=tiers)


def _usable_names(fleet: Fleet) -> list[str]:
    return [name for name, model_id in fleet.model_ids.items() if _may_use_model(model_id)]


def _may_use_model(name: str) -> bool:
    allowed = caller().limits.allowed_models
    return allowed is None or name in allowed


def _may_use_tier(name: str) -> bool:
    allowed = caller().limits.allowed_tiers
    return allowed is None or name in allowed


def _model_view(fleet: Fleet, name: str) -> dict[str, Any]:
    model_id = fleet.model_ids[name]
    model = fleet.models[model_id]
    per_tier = {}
    for tier_name in fleet.tiers:
        if not _may_use_tier(tier_name):
            continue
        own = model.tiers.get(tier_name, ModelTier())
        guidance = model.default_guidance if own.default_guidance is None else own.default_guidance
        per_tier[tier_name] = {"default_steps": fleet.default_steps(model_id, tier_name), "default_guidance": guidance}
    return {
        "id": name,
        **({"alias_of": model_id} if name != model_id else {}),
        "object": "model",
        "created": int(model.created_at.timestamp()),
        "owned_by": "darkroom",
        "title": model.title,
        "aliases": list(model.aliases),
        "family": model.family,
        "licence": model.licence,
        "precision": model.precision,
        "sizes": list(model.sizes),
        "samplers": list(model.samplers),
        "default_sampler": model.default_sampler,
        "max_guidance": model.max_guidance,
        "max_prompt_chars": model.max_prompt_chars,
        "output_formats": list(OUTPUT_FORMATS),
        "pool": fleet.pool_of(model_id),
        "versions": [{"id": version.id, "traffic_weight": version.traffic_weight} for version in model.versions],
        "tiers": per_tier,
    }
