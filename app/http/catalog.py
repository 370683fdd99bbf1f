"""Serve /v1/models and /v1/tiers: what fleet.toml offers."""

from typing import Any

from flask import Blueprint
from flask.typing import ResponseReturnValue

from app.http.answers import answer
from app.http.auth import require_key
from app.http.context import caller, runtime
from app.problems import ModelNotFound
from app.schemas import catalog as schemas
from policy import capabilities
from policy.capabilities import Capabilities
from policy.fleet import Fleet, Model, ModelTier, ModelVersion, checkpoint_name
from policy.formats import FORMATS
from policy.offers import offer_of, offered_names, offered_pools, offered_tiers, split_name
from policy.routing import Asker

bp = Blueprint("catalog", __name__, url_prefix="/v1")
bp.before_request(require_key)


@bp.get("/models")
def list_models() -> ResponseReturnValue:
    """List the models in OpenAI's shape, with members of our own added.

    Aliases come after the models: some programs look up the model they asked for in this list.
    """
    fleet = runtime().fleet
    asker = runtime().asker(caller())
    offered = offered_names(fleet, asker)
    return answer(schemas.Models(data=[_model_view(fleet, name, asker) for name in offered]))


@bp.get("/models/<path:name>")
def show_model(name: str) -> ResponseReturnValue:
    """Show one model, by its id or an alias: sizes, samplers, versions, defaults by tier."""
    fleet = runtime().fleet
    asker = runtime().asker(caller())
    offered = offered_names(fleet, asker)
    if name not in offered:
        raise ModelNotFound(f"There is no model {name[:64]!r}.", accepted=list(offered))
    return answer(_model_view(fleet, name, asker))


@bp.get("/tiers")
def list_tiers() -> ResponseReturnValue:
    """List the tiers in the order in which they are served."""
    fleet = runtime().fleet
    offered = offered_tiers(fleet, runtime().asker(caller()))
    in_order = [name for name in fleet.tiers_by_rank if name in offered]
    return answer(schemas.Tiers(data=[_tier_view(fleet, name) for name in in_order]))


def _tier_view(fleet: Fleet, name: str) -> schemas.Tier:
    tier = fleet.tiers[name]
    return schemas.Tier(
        id=name,
        rank=tier.rank,
        max_steps=tier.max_steps,
        default_steps=tier.default_steps,
        max_images=tier.max_images,
        max_megapixels=tier.max_megapixels,
        determinism=tier.determinism,
        price_weight=tier.price_weight,
        start_within_s=tier.start_within_s,
        first_preview_s=tier.first_preview_s,
        final_s=tier.final_s,
        slo=schemas.Slo(**tier.slo.targets()),
    )


def _model_view(fleet: Fleet, name: str, asker: Asker) -> schemas.Model:
    """Show one of the offered names."""
    model_id = fleet.model_ids[split_name(fleet, name)[0]]
    model = fleet.models[model_id]
    offer = offer_of(fleet, model_id, asker)
    is_alias = name != model_id
    kind = schemas.ModelAlias if is_alias else schemas.Model
    pools = list(offered_pools(fleet, model_id, asker))
    alias: dict[str, Any] = {"alias_of": model_id} if is_alias else {}
    return kind(
        id=name,
        created=int(model.created_at.timestamp()),
        title=model.title,
        aliases=list(model.aliases),
        family=model.family,
        licence=model.licence,
        precision=model.precision,
        sizes=list(model.sizes),
        samplers=list(model.samplers),
        adapters=list(model.adapters),
        default_sampler=model.default_sampler,
        max_guidance=model.max_guidance,
        max_prompt_chars=model.max_prompt_chars,
        output_formats=list(FORMATS),
        pool=pools[0],
        pools=pools,
        versions=[
            _version_view(model_id, model.of_version(version.id), version)
            for version in model.versions
            if version.id in offer.versions
        ],
        tiers={tier: _defaults(fleet, model_id, tier) for tier in offer.tiers},
        **alias,
    )


def _version_view(model_id: str, served: Model, version: ModelVersion) -> schemas.ModelVersion:
    """Show one version. served: the model as this version serves it."""
    checkpoint = checkpoint_name(model_id, version.id)
    able = capabilities.of_version(runtime().abilities.known(), checkpoint, served, version.id)
    return schemas.ModelVersion(
        id=version.id,
        traffic_weight=version.traffic_weight,
        precision=served.precision,
        quantize=version.quantize,
        licence=served.licence,
        loaded=checkpoint in runtime().abilities.loaded(),
        capabilities=None if able is None else _capabilities_view(served, able),
    )


def _capabilities_view(served: Model, able: Capabilities) -> schemas.Capabilities:
    """Show what the version can do, of what the catalogue offers."""
    return schemas.Capabilities(
        # By role: a newer worker may publish others, an older one fewer.
        pictures=schemas.PictureNeeds(
            init_image=able.pictures.get("init_image", "none"),
            mask=able.pictures.get("mask", "none"),
            control_image=able.pictures.get("control_image", "none"),
        ),
        takes_strength=able.takes_strength,
        negative_prompt=able.negative_prompt,
        guidance=able.guidance,
        max_clip_skip=able.max_clip_skip,
        samplers={
            name: schemas.SamplerLimits(
                max_steps=limits.max_steps, takes_picture=limits.takes_picture
            )
            for name, limits in able.samplers.items()
            if name in served.samplers
        },
        adapters={
            name: schemas.AdapterFacts(rank=facts.rank, trigger_words=list(facts.trigger_words))
            for name, facts in able.adapters.items()
            if name in served.adapters
        },
        prompt_tokens=able.prompt_tokens,
        sizes=[size for size in able.sizes if size in served.sizes],
    )


def _defaults(fleet: Fleet, model_id: str, tier: str) -> schemas.ModelDefaults:
    """Show the model's defaults in the tier."""
    model = fleet.models[model_id]
    own = model.tiers.get(tier, ModelTier())
    guidance = own.default_guidance
    return schemas.ModelDefaults(
        default_steps=fleet.default_steps(model_id, tier),
        default_guidance=model.default_guidance if guidance is None else guidance,
        default_sampler=own.default_sampler or model.default_sampler,
        version=own.version,
        adapters=[adapter.name for adapter in own.adapters],
    )
