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
from policy.catalog import MAX_ADAPTERS
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

    model: Annotated[str | None, says("A model or one of its other names.")]
    n: Annotated[Annotated[int, Field(ge=1, le=MOST_IMAGES)] | None, says("How many images.")]
    size: Annotated[str | None, says("Such as 512x512, or auto.")]
    quality: Annotated[
        Annotated[str, one_of(QUALITIES)] | None,
        says("Stands for a tier and steps, where `tier` does not say one."),
    ]
    output_format: Annotated[OutputFormat | None, says("The format of the images.")]
    output_compression: Annotated[Literal[100] | None, says("Files are written at one quality.")]
    response_format: Annotated[
        Annotated[str, one_of(RESPONSE_FORMATS)] | None,
        says("The image itself, or a link that shows it for a while."),
    ]
    background: Annotated[
        bool | Literal["auto", "opaque"] | None,
        says("True: a streamed job goes on when its client has left."),
    ]
    moderation: Annotated[
        Annotated[str, one_of(MODERATIONS)] | None,
        says("Makes no difference here."),
    ]
    style: Annotated[Annotated[str, one_of(STYLES)] | None, says("Makes no difference here.")]
    input_fidelity: Annotated[
        Annotated[str, one_of(FIDELITIES)] | None,
        says("Makes no difference here."),
    ]
    stream: Annotated[bool | None, says("Answer with server-sent events; for one image.")]
    partial_images: Annotated[
        Annotated[int, Field(ge=0, le=MOST_PARTIALS)] | None,
        says("How many images a stream shows on the way."),
    ]
    user: Annotated[
        Annotated[str, Field(max_length=MOST_USER_CHARS)] | None,
        says("On whose behalf; kept as metadata `user`."),
    ]
    safety_identifier: Annotated[
        Annotated[str, Field(max_length=MOST_USER_CHARS)] | None,
        says("On whose behalf; before `user`."),
    ]
    adapters: Annotated[
        Annotated[list[Adapter], Field(max_length=MAX_ADAPTERS)] | None,
        says("Adapters of the model, and how much of each."),
    ]
    metadata: Annotated[
        Annotated[dict[str, str], Field(max_length=MAX_METADATA_KEYS)] | None,
        says("Your own; in a form also as `metadata[key]`."),
    ]


@with_config(described("What a picture is to be made of."))
class GenerationBody(ImagesBody, total=False):
    prompt: Required[Annotated[str, says("What the images show.")]]


class ImageUrl(TypedDict):
    image_url: Annotated[str, says("A data URL; an https URL for tenants that may.")]


class FileId(TypedDict):
    file_id: Annotated[str, says("The id that POST /v1/files answered with.")]


Source = Annotated[
    str | ImageUrl | FileId,
    says("A data URL, the id of a file, or an object that holds one."),
]
OneSource = Annotated[list[Source], Field(min_length=1, max_length=1)]
Strength = Annotated[float | None, says("How far from the picture, from above 0 to 1.")]


@with_config(described("A picture and what is to become of it. `image` and `images` are the same."))
class EditBody(GenerationBody, total=False):
    image: Annotated[OneSource | Source | None, says("The picture, if `images` does not say it.")]
    images: Annotated[OneSource | Source | None, says("The picture.")]
    mask: Annotated[Source | None, says("Transparent, or else white, where it is painted anew.")]
    strength: Strength


@with_config(described("A picture that others are to be like. `image` and `images` are the same."))
class VariationBody(ImagesBody, total=False):
    prompt: Annotated[str | None, says("What the images show.")]
    image: Annotated[OneSource | Source | None, says("The picture, if `images` does not say it.")]
    images: Annotated[OneSource | Source | None, says("The picture.")]
    strength: Strength


@with_config(described("The same as a form; lists and objects in it are JSON."))
class EditForm(GenerationBody, total=False):
    image: Required[Annotated[Upload, says("The picture; also as `image[]`.")]]
    mask: Annotated[Upload, says("Transparent, or else white, where it is painted anew.")]
    strength: Strength


@with_config(described("The same as a form; lists and objects in it are JSON."))
class VariationForm(ImagesBody, total=False):
    prompt: Annotated[str | None, says("What the images show.")]
    image: Required[Annotated[Upload, says("The picture; also as `image[]`.")]]
    strength: Strength


@document("Tokens of what was sent: none, for nothing here is counted in them.")
class InputTokens:
    text_tokens: Annotated[Literal[0], says("None.")] = 0
    image_tokens: Annotated[Literal[0], says("None.")] = 0


@document("Tokens: none, for nothing here is counted in them.")
class TokenUsage:
    input_tokens: Annotated[Literal[0], says("None.")] = 0
    output_tokens: Annotated[Literal[0], says("None.")] = 0
    total_tokens: Annotated[Literal[0], says("None.")] = 0
    input_tokens_details: InputTokens


NO_TOKENS = TokenUsage(input_tokens_details=InputTokens())


@document("Members of our own: enough to find the job, and to ask for the same again.")
@with_params(OPENAI_ANSWER)
class OwnMembers:
    job_id: Annotated[UUID, says("The job behind the call.")]
    warnings: Annotated[list[JobWarning], says("What was asked for and has no effect.")]


@document("An image and its digests.")
class Digests:
    pixels_sha256: Annotated[Sha256, says("Of its RGB pixels: tells same images apart.")]
    content_sha256: Annotated[Sha256, says("Of the file.")]


@document("An image, as itself.")
class ImageContent(Digests):
    b64_json: Annotated[str, says("The file.", contentEncoding="base64")]
    seed: Annotated[int, says("The seed that it was made from.")]


@document("An image, as a link.")
class ImageLink(Digests):
    url: Annotated[str, says("Shows the image for a while to whoever has it.")]
    seed: Annotated[int, says("The seed that it was made from.")]


@document("Images, as OpenAI answers, with members of our own.")
class Images(OwnMembers):
    created: Annotated[int, says("When the job was accepted, in seconds since 1970.")]
    background: Annotated[Literal["opaque"], says("No image is transparent.")] = "opaque"
    data: Annotated[list[ImageContent | ImageLink], says("The images.")]
    output_format: Annotated[OutputFormat, says("The format of the images.")]
    quality: Annotated[str | None, says("What was asked for; null for auto.")]
    size: Annotated[Size, says("Width and height in pixels.")]
    usage: TokenUsage


@document("Images that were asked for on somebody's behalf.")
class ImagesOnBehalf(Images):
    safety_identifier: Annotated[str, says("On whose behalf.")]


@document("How every event with an image begins.")
class ImageEvent:
    b64_json: Annotated[str, says("The file.", contentEncoding="base64")]
    created_at: Annotated[int, says("Now, in seconds since 1970.")]
    size: Annotated[Size, says("Width and height in pixels.")]
    quality: Annotated[str, says("What was asked for.")]
    background: Annotated[Literal["opaque"], says("No image is transparent.")] = "opaque"
    output_format: Annotated[OutputFormat, says("The format of the image.")]


@document("What the image looks like by now.")
class PartialImage(ImageEvent):
    type: Annotated[
        Annotated[str, one_of(["image_generation.partial_image", "image_edit.partial_image"])],
        says("What the event is."),
    ]
    partial_image_index: Annotated[int, says("The first is 0.")]
    step: Annotated[int, says("Steps that are done.")]
    steps: Annotated[int, says("Of so many.")]
    job_id: Annotated[UUID, says("The job behind the call.")]


@document("The image; the stream is over.")
class CompletedImage(OwnMembers, Digests, ImageEvent):
    type: Annotated[
        Annotated[str, one_of(["image_generation.completed", "image_edit.completed"])],
        says("What the event is."),
    ]
    usage: TokenUsage


@document("The image, which was asked for on somebody's behalf; the stream is over.")
class CompletedImageOnBehalf(CompletedImage):
    safety_identifier: Annotated[str, says("On whose behalf.")]


@document("Why there is no image; the stream is over.")
class StreamError:
    type: Annotated[Literal["error"], says("What the event is.")] = "error"
    error: OpenAIError


STREAM = {
    "partial_image": (PartialImage,),
    "completed": (CompletedImage, CompletedImageOnBehalf),
    "error": (StreamError,),
}
