"""Define requests and answers of OpenAI's images interface, with our own members added."""

from typing import Annotated, Literal, Required
from uuid import UUID

from pydantic import Field, with_config
from typing_extensions import TypedDict

from app.openai.body import (
    FIDELITIES,
    MODERATIONS,
    MOST_IMAGES,
    MOST_PARTIALS,
    MOST_USER_CHARS,
    QUALITIES,
    RESPONSE_FORMATS,
    STYLES,
)
from app.schemas.base import Sha256, Size, described, document, one_of, says, with_params
from app.schemas.bodies import MAX_METADATA_KEYS
from app.schemas.files import Upload
from app.schemas.jobs import Adapter, JobWarning, OutputFormat
from app.schemas.problems import OpenAIError
from policy.fleet import MAX_ADAPTERS
from policy.params import OPENAI_ANSWER, OPENAI_REQUEST

_WITH_A_PICTURE = "strength"
_Extras = TypedDict(  # type: ignore[misc]  # its fields are known at run time
    "_Extras",
    {
        param.member: Annotated[param.kind | None, says(param.says)]
        for param in OPENAI_REQUEST
        if param.member and param.member != _WITH_A_PICTURE
    },
    total=False,
)


class ImagesBody(_Extras, total=False):
    """The fields of every image call; job parameters that OpenAI does not have come first."""

    model: Annotated[str | None, says("The id or an alias of a model.")]
    n: Annotated[Annotated[int, Field(ge=1, le=MOST_IMAGES)] | None, says("The number of images.")]
    size: Annotated[str | None, says("Width and height in pixels, such as 512x512, or auto.")]
    quality: Annotated[
        Annotated[str, one_of(QUALITIES)] | None,
        says("Chooses the tier and the steps if `tier` is not given."),
    ]
    output_format: Annotated[OutputFormat | None, says("The format of the images.")]
    output_compression: Annotated[
        Literal[100] | None, says("Only 100: files are written at one quality.")
    ]
    response_format: Annotated[
        Annotated[str, one_of(RESPONSE_FORMATS)] | None,
        says("The image itself, or a link to it that expires."),
    ]
    background: Annotated[
        bool | Literal["auto", "opaque"] | None,
        says("true: a streamed job goes on when the client disconnects."),
    ]
    moderation: Annotated[
        Annotated[str, one_of(MODERATIONS)] | None,
        says("Accepted for compatibility; it has no effect."),
    ]
    style: Annotated[
        Annotated[str, one_of(STYLES)] | None, says("Accepted for compatibility; it has no effect.")
    ]
    input_fidelity: Annotated[
        Annotated[str, one_of(FIDELITIES)] | None,
        says("Accepted for compatibility; it has no effect."),
    ]
    stream: Annotated[bool | None, says("Answer with server-sent events; only for one image.")]
    partial_images: Annotated[
        Annotated[int, Field(ge=0, le=MOST_PARTIALS)] | None,
        says("How many unfinished images a stream shows."),
    ]
    user: Annotated[
        Annotated[str, Field(max_length=MOST_USER_CHARS)] | None,
        says("Your id of the end user; kept as the metadata entry `user`."),
    ]
    safety_identifier: Annotated[
        Annotated[str, Field(max_length=MOST_USER_CHARS)] | None,
        says("Your id of the end user; takes precedence over `user`."),
    ]
    adapters: Annotated[
        Annotated[list[Adapter], Field(max_length=MAX_ADAPTERS)] | None,
        says("Adapters (LoRA) of the model, each with its strength."),
    ]
    metadata: Annotated[
        Annotated[dict[str, str], Field(max_length=MAX_METADATA_KEYS)] | None,
        says("Your own entries; in a form also as `metadata[key]`."),
    ]


@with_config(described("A request for images from a prompt."))
class GenerationBody(ImagesBody, total=False):
    prompt: Required[Annotated[str, says("What the images show.")]]


class ImageUrl(TypedDict):
    image_url: Annotated[str, says("A data URL, or an https URL if your tenant may use them.")]


class FileId(TypedDict):
    file_id: Annotated[str, says("The id of an uploaded file, from POST /v1/files.")]


Source = Annotated[
    str | ImageUrl | FileId,
    says("A data URL, the id of an uploaded file, or an object with one of them."),
]
OneSource = Annotated[list[Source], Field(min_length=1, max_length=1)]
Strength = Annotated[float | None, says("How much the picture is changed, above 0 and at most 1.")]


@with_config(described("A picture and how to change it. Give it as `image` or as `images`."))
class EditBody(GenerationBody, total=False):
    image: Annotated[OneSource | Source | None, says("The picture, if `images` is not given.")]
    images: Annotated[OneSource | Source | None, says("The picture.")]
    mask: Annotated[
        Source | None, says("Transparent, or else white, where the picture may change.")
    ]
    strength: Strength


@with_config(described("A picture to vary. Give it as `image` or as `images`."))
class VariationBody(ImagesBody, total=False):
    prompt: Annotated[str | None, says("What the images show.")]
    image: Annotated[OneSource | Source | None, says("The picture, if `images` is not given.")]
    images: Annotated[OneSource | Source | None, says("The picture.")]
    strength: Strength


@with_config(described("The same fields as a form; lists and objects in it are JSON."))
class EditForm(GenerationBody, total=False):
    image: Required[Annotated[Upload, says("The picture; the field may be named `image[]`.")]]
    mask: Annotated[Upload, says("Transparent, or else white, where the picture may change.")]
    strength: Strength


@with_config(described("The same fields as a form; lists and objects in it are JSON."))
class VariationForm(ImagesBody, total=False):
    prompt: Annotated[str | None, says("What the images show.")]
    image: Required[Annotated[Upload, says("The picture; the field may be named `image[]`.")]]
    strength: Strength


@document("Tokens of the request.")
class InputTokens:
    text_tokens: Annotated[int, says("Those of the prompt.")]
    image_tokens: Annotated[Literal[0], says("Always 0.")] = 0


@document("Tokens: those of the prompt. Nothing is priced by them.")
class TokenUsage:
    input_tokens: Annotated[int, says("Those of the prompt; 0 if the model cannot tell.")]
    output_tokens: Annotated[Literal[0], says("Always 0.")] = 0
    total_tokens: Annotated[int, says("The same as `input_tokens`.")]
    input_tokens_details: InputTokens


def usage_of(prompt_tokens: int | None) -> TokenUsage:
    """Tell the tokens of a job by those of its prompt; None: they are not known."""
    tokens = prompt_tokens or 0
    details = InputTokens(text_tokens=tokens)
    return TokenUsage(input_tokens=tokens, total_tokens=tokens, input_tokens_details=details)


@document("Additional members: the job, and its parameters.")
@with_params(OPENAI_ANSWER)
class OwnMembers:
    job_id: Annotated[UUID, says("The job that this call created.")]
    warnings: Annotated[list[JobWarning], says("Parts of the request that have no effect.")]


@document("An image and its digests.")
class Digests:
    pixels_sha256: Annotated[Sha256, says("SHA-256 of its RGB pixels; equal for equal images.")]
    content_sha256: Annotated[Sha256, says("SHA-256 of the file.")]


@document("An image.")
class ImageContent(Digests):
    b64_json: Annotated[str, says("The image file.", contentEncoding="base64")]
    seed: Annotated[int, says("The seed of this image.")]


@document("A link to an image.")
class ImageLink(Digests):
    url: Annotated[str, says("A link that needs no key and expires.")]
    seed: Annotated[int, says("The seed of this image.")]


@document("Images, in the format of OpenAI, with additional members.")
class Images(OwnMembers):
    created: Annotated[int, says("When the job was accepted, in seconds since 1970.")]
    background: Annotated[Literal["opaque"], says("No image is transparent.")] = "opaque"
    data: Annotated[list[ImageContent | ImageLink], says("The images.")]
    output_format: Annotated[OutputFormat, says("The format of the images.")]
    quality: Annotated[str | None, says("The quality in the request; null for auto.")]
    size: Annotated[Size, says("Width and height in pixels.")]
    usage: TokenUsage


@document("Images for an end user whom the request named.")
class ImagesOnBehalf(Images):
    safety_identifier: Annotated[str, says("Your id of the end user.")]


@document("The members of every event with an image.")
class ImageEvent:
    b64_json: Annotated[str, says("The image file.", contentEncoding="base64")]
    created_at: Annotated[int, says("The time of the event, in seconds since 1970.")]
    size: Annotated[Size, says("Width and height in pixels.")]
    quality: Annotated[str, says("The quality in the request.")]
    background: Annotated[Literal["opaque"], says("No image is transparent.")] = "opaque"
    output_format: Annotated[OutputFormat, says("The format of the image.")]


@document("A preview of the unfinished image.")
class PartialImage(ImageEvent):
    type: Annotated[
        Annotated[str, one_of(["image_generation.partial_image", "image_edit.partial_image"])],
        says("The type of the event."),
    ]
    partial_image_index: Annotated[int, says("The number of the preview, from 0.")]
    step: Annotated[int, says("Denoise steps that are done.")]
    steps: Annotated[int, says("Denoise steps in all.")]
    job_id: Annotated[UUID, says("The job that this call created.")]


@document("The finished image; the stream ends.")
class CompletedImage(OwnMembers, Digests, ImageEvent):
    type: Annotated[
        Annotated[str, one_of(["image_generation.completed", "image_edit.completed"])],
        says("The type of the event."),
    ]
    usage: TokenUsage


@document("The finished image, for an end user whom the request named; the stream ends.")
class CompletedImageOnBehalf(CompletedImage):
    safety_identifier: Annotated[str, says("Your id of the end user.")]


@document("Why there is no image; the stream ends.")
class StreamError:
    type: Annotated[Literal["error"], says("The type of the event.")] = "error"
    error: OpenAIError


STREAM = {
    "partial_image": (PartialImage,),
    "completed": (CompletedImage, CompletedImageOnBehalf),
    "error": (StreamError,),
}
