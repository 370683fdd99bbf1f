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
        description="Images from a prompt; with `stream`, server-sent events with partial images on"
        " the way. Under every call is a job, which `job_id` names.",
        answers=_ANSWERS,
        events=STREAM,
        body={JSON: schemas.GenerationBody},
        examples={JSON: {"prompt": PROMPT, "size": "128x128", "seed": 7, "steps": 4}},
        parameters=(IDEMPOTENCY_KEY,),
    ),
    ("POST", "/v1/images/edits"): Operation(
        summary="Edit a picture (OpenAI)",
        description="A picture painted over as the prompt says; with a mask, only where that is"
        " transparent, or white if it is transparent nowhere. Without one, a part of the picture"
        " that is transparent is the mask.",
        answers=_ANSWERS,
        events=STREAM,
        body={FORM: schemas.EditForm, JSON: schemas.EditBody},
        examples={JSON: _EDIT},
        parameters=(IDEMPOTENCY_KEY,),
    ),
    ("POST", "/v1/images/variations"): Operation(
        summary="Vary a picture (OpenAI)",
        description="Pictures like the one that is sent.",
        answers=_ANSWERS,
        body={FORM: schemas.VariationForm, JSON: schemas.VariationBody},
        examples={JSON: _VARY},
        parameters=(IDEMPOTENCY_KEY,),
    ),
}
