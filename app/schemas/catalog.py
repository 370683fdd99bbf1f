"""Define documents of models and tiers."""

from typing import Annotated, Literal

from app.schemas.base import document, one_of, says
from policy.formats import FORMATS

Need = Annotated[
    Literal["none", "optional", "required"], says("Whether the picture is taken, or needed.")
]


@document("What one sampler takes.")
class SamplerLimits:
    max_steps: Annotated[int, says("The most denoise steps; the tier may allow fewer.")]
    takes_picture: Annotated[bool, says("Whether it can start from an `init_image`.")]


@document("An adapter (LoRA), as its file describes it.")
class AdapterFacts:
    rank: Annotated[int, says("Its largest rank.")]
    trigger_words: Annotated[
        list[str], says("Words that call it up in a prompt; empty where its file names none.")
    ]


@document("Which pictures a request has to give, may give, and must not give.")
class PictureNeeds:
    init_image: Need
    mask: Need
    control_image: Need


@document("What may be asked of a version of a model, as a worker that loaded it describes it.")
class Capabilities:
    pictures: Annotated[PictureNeeds, says("The pictures that it takes.")]
    takes_strength: Annotated[bool, says("Whether `strength` may be other than 1.")]
    negative_prompt: Annotated[
        Literal["refused", "ignored", "guided", "used"],
        says(
            "`used`: has an effect; `guided`: has one with guidance above 1; `ignored`: is taken"
            " without any effect; `refused`: is not taken."
        ),
    ]
    guidance: Annotated[
        Literal["ignored", "negated", "used"],
        says(
            "`used`: has an effect; `negated`: has one with a negative prompt; `ignored`: has none."
        ),
    ]
    max_clip_skip: Annotated[int, says("The largest `clip_skip`; 0 where it has no effect.")]
    samplers: Annotated[dict[str, SamplerLimits], says("The limits of each of its samplers.")]
    adapters: Annotated[dict[str, AdapterFacts], says("Its adapters.")]
    prompt_tokens: Annotated[
        dict[str, int],
        says(
            "Tokens of a prompt that each text encoder reads; empty where the model's pipeline"
            " decides."
        ),
    ]
    sizes: Annotated[list[str], says("The sizes that it was seen to make.")]


@document("A version of a model.")
class ModelVersion:
    id: str
    traffic_weight: Annotated[float, says("Its share of new jobs, relative to the other versions.")]
    precision: Annotated[str, says("The number format that it computes in.")]
    quantize: Annotated[
        Literal["int8", "float8"] | None, says("How its weights are held; null: in `precision`.")
    ]
    licence: Annotated[str, says("The licence of its weights.")]
    loaded: Annotated[
        bool,
        says(
            "Whether a live worker has it in its device's memory; if not, the first job for it"
            " waits until it is loaded."
        ),
    ]
    capabilities: Annotated[
        Capabilities | None, says("What may be asked of it; null until a worker has loaded it.")
    ]


@document("The defaults of a model in a tier.")
class ModelDefaults:
    default_steps: Annotated[int, says("Denoise steps of each image.")]
    default_guidance: Annotated[float, says("How closely images follow the prompt.")]
    default_sampler: Annotated[str, says("The sampling method.")]
    version: Annotated[
        str | None, says("The version that renders its jobs; null if it is drawn by weight.")
    ]
    adapters: Annotated[list[str], says("Adapters that every image of the tier has.")]


@document("A model, in the format of OpenAI's model list, with additional members.")
class Model:
    id: str
    object: Literal["model"] = "model"
    created: Annotated[int, says("When it was created, in seconds since 1970.")]
    owned_by: Annotated[
        Literal["darkroom"], says("Always `darkroom`; clients of OpenAI expect it.")
    ] = "darkroom"
    title: Annotated[str, says("The name to show to people.")]
    aliases: Annotated[list[str], says("Other names by which requests may name it.")]
    family: Annotated[str, says("The kind of network, such as `sdxl`.")]
    licence: Annotated[str, says("The licence of its weights.")]
    precision: Annotated[str, says("The number format that it computes in.")]
    sizes: Annotated[list[str], says("The sizes of image that it makes.")]
    samplers: Annotated[list[str], says("The sampling methods that it offers.")]
    adapters: Annotated[list[str], says("The adapters (LoRA) that it offers.")]
    default_sampler: Annotated[str, says("The sampler of a job that names none.")]
    max_guidance: Annotated[float, says("The largest guidance that it accepts.")]
    max_prompt_chars: Annotated[int, says("The longest prompt that it accepts, in characters.")]
    output_formats: Annotated[
        list[Annotated[str, one_of(FORMATS)]], says("The file formats that it offers.")
    ]
    pool: Annotated[str, says("The first of `pools`.")]
    pools: Annotated[list[str], says("The groups of workers that may serve it for you.")]
    versions: Annotated[list[ModelVersion], says("Its versions.")]
    tiers: Annotated[dict[str, ModelDefaults], says("Its defaults by tier.")]


@document("A model under one of its aliases.")
class ModelAlias(Model):
    alias_of: Annotated[str, says("The id of the model.")]


@document("Models, and after them their aliases.")
class Models:
    object: Literal["list"] = "list"
    data: Annotated[list[ModelAlias | Model], says("The models.")]


@document("The part of a tier's jobs that is to meet each of its targets.")
class Slo:
    first_preview: Annotated[float, says("A first preview within `first_preview_s`.")]
    final: Annotated[float, says("All images stored within `final_s`.")]
    success: Annotated[float, says("Neither expired nor failed by a fault of the installation.")]
    eta: Annotated[float, says("Over before the `eta_p90_s` that was told at accept.")]


@document("A class of service.")
class Tier:
    id: str
    object: Literal["tier"] = "tier"
    rank: Annotated[int, says("Tiers of a lower rank are served first.")]
    max_steps: Annotated[int, says("The most denoise steps of an image.")]
    default_steps: Annotated[int, says("Denoise steps, unless the job or the model sets others.")]
    max_images: Annotated[int, says("The most images of a job.")]
    max_megapixels: Annotated[float, says("The largest image, in millions of pixels.")]
    determinism: Annotated[
        Literal["best_effort", "reproducible"],
        says(
            "`reproducible`: the same parameters give the same pixels on the same class of device."
        ),
    ]
    price_weight: Annotated[float, says("The price of a device second, relative to other tiers.")]
    start_within_s: Annotated[
        int, says("A job expires if it is not started within so many seconds.")
    ]
    first_preview_s: Annotated[float, says("The target for the first preview, in seconds.")]
    final_s: Annotated[float, says("The target for the finished images, in seconds.")]
    slo: Slo


@document("Tiers in the order in which they are served.")
class Tiers:
    object: Literal["list"] = "list"
    data: Annotated[list[Tier], says("The tiers.")]
