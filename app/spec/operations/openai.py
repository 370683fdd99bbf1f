"""Describe the operations of OpenAI's images interface."""

from app.schemas import openai as schemas
from app.schemas.openai import STREAM
from app.spec.operation import FORM, IDEMPOTENCY_KEY, JSON, PROMPT, Operation

_DOT = "data:image/webp;base64,UklGRh4AAABXRUJQVlA4TBEAAAAvAUAAAAdQjyLXo/+BiOh/AAA="
_EDIT = {"prompt": PROMPT, "images": [{"image_url": _DOT}], "steps": 4, "tier": "fast"}
_VARY = {"images": [{"image_url": _DOT}], "steps": 4, "tier": "fast"}
_ANSWERS = (schemas.Images, schemas.ImagesOnBehalf)

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/images/generations"): Operation(
        summary="Generate images (OpenAI)",
        description="Makes images from a prompt. With `stream` the answer is server-sent events,"
        " which may show unfinished images. Each call creates a job, whose id is `job_id`.",
        answers=_ANSWERS,
        events=STREAM,
        body={JSON: schemas.GenerationBody},
        examples={JSON: {"prompt": PROMPT, "size": "128x128", "seed": 7, "steps": 4}},
        parameters=(IDEMPOTENCY_KEY,),
    ),
    ("POST", "/v1/images/edits"): Operation(
        summary="Edit a picture (OpenAI)",
        description="Changes a picture as the prompt says. A mask limits the change to the part"
        " where the mask is transparent or, if it has no transparent part, where it is white."
        " Without a mask, the transparent part of the picture is changed, if it has one.",
        answers=_ANSWERS,
        events=STREAM,
        body={FORM: schemas.EditForm, JSON: schemas.EditBody},
        examples={JSON: _EDIT},
        parameters=(IDEMPOTENCY_KEY,),
    ),
    ("POST", "/v1/images/variations"): Operation(
        summary="Vary a picture (OpenAI)",
        description="Makes images that resemble the picture in the request.",
        answers=_ANSWERS,
        body={FORM: schemas.VariationForm, JSON: schemas.VariationBody},
        examples={JSON: _VARY},
        parameters=(IDEMPOTENCY_KEY,),
    ),
}
