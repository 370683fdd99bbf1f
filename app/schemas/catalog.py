"""Define documents of models and tiers."""

from typing import Annotated, Literal

from app.schemas.base import document, one_of, says
from policy.formats import FORMATS


@document("A version of a model.")
class ModelVersion:
    id: str
    traffic_weight: Annotated[float, says("Its share of the jobs that name no version.")]


@document("What a model does in a tier unless a job says otherwise.")
class ModelDefaults:
    default_steps: Annotated[int, says("Denoise steps of each image.")]
    default_guidance: Annotated[float, says("How closely images follow the prompt.")]


@document("A model, in the shape of OpenAI's list with members of our own.")
class Model:
    id: str
    object: Literal["model"] = "model"
    created: Annotated[int, says("When it was made, in seconds since 1970.")]
    owned_by: Annotated[Literal["darkroom"], says("Of whom; OpenAI's clients ask.")] = "darkroom"
    title: Annotated[str, says("Its name for people.")]
    aliases: Annotated[list[str], says("Other names that requests may call it by.")]
    family: Annotated[str, says("The kind of network.")]
    licence: Annotated[str, says("The licence of its weights.")]
    precision: Annotated[str, says("The numbers that it computes with.")]
    sizes: Annotated[list[str], says("Sizes of images that it draws.")]
    samplers: Annotated[list[str], says("Sampling methods that it knows.")]
    default_sampler: Annotated[str, says("The one that is used unless a job says otherwise.")]
    max_guidance: Annotated[float, says("The largest guidance that it takes.")]
    max_prompt_chars: Annotated[int, says("The longest prompt that it takes.")]
    output_formats: Annotated[
        list[Annotated[str, one_of(FORMATS)]], says("Formats that images may have.")
    ]
    pool: Annotated[str, says("The workers that hold it.")]
    versions: Annotated[list[ModelVersion], says("Its versions.")]
    tiers: Annotated[dict[str, ModelDefaults], says("Its defaults by tier.")]


@document("A model by another name.")
class ModelAlias(Model):
    alias_of: Annotated[str, says("The id of the model.")]


@document("Models, and after them their other names.")
class Models:
    object: Literal["list"] = "list"
    data: Annotated[list[ModelAlias | Model], says("The models.")]


@document("A class of service.")
class Tier:
    id: str
    object: Literal["tier"] = "tier"
    rank: Annotated[int, says("Tiers of a lower rank are served first.")]
    max_steps: Annotated[int, says("The most steps that a job may have.")]
    default_steps: Annotated[int, says("Its steps, unless job or model say otherwise.")]
    max_images: Annotated[int, says("The most images that a job may have.")]
    max_megapixels: Annotated[float, says("The largest image, in millions of pixels.")]
    determinism: Annotated[
        Literal["best_effort", "reproducible"],
        says("`reproducible`: the same parameters give the same pixels on hardware of one class."),
    ]
    price_weight: Annotated[float, says("What a device second costs, compared with other tiers.")]
    start_within_s: Annotated[int, says("Jobs that are not begun in so many seconds expire.")]
    first_preview_s: Annotated[float, says("The aim for the first preview.")]
    final_s: Annotated[float, says("The aim for the images.")]


@document("Tiers in the order in which they are served.")
class Tiers:
    object: Literal["list"] = "list"
    data: Annotated[list[Tier], says("The tiers.")]
