"""What a tenant is told of a job that is served although not all that it says has an effect. Pure."""

from typing import Any

from policy.fleet import OPEN_FAMILIES, Model
from policy.params import Resolved
from policy.steps import rows_taken

TRUNCATED = "prompt_truncated"  # the text encoder of the model cuts the end off
IGNORED = "negative_prompt_ignored"


def expected(model: Model, job: Resolved) -> list[dict[str, Any]]:
    """What is known before the job is rendered. How long a text is in tokens is known to the workers alone, which hold the tokenizers."""
    if model.family in OPEN_FAMILIES or not job.negative_prompt.strip():
        return []
    rows = rows_taken(model, guidance=job.guidance, negative_prompt=job.negative_prompt)
    return [ignored(job.guidance)] if rows == 1 else []


def unread(field: str, *, tokens_given: int, tokens_read: int, guidance: float) -> dict[str, Any]:
    """Of a text of which the model read only so many tokens, the first ones."""
    if tokens_read == 0 and field == "negative_prompt":
        return ignored(guidance)
    detail = f"The model reads the first {tokens_read} tokens of {field}, which has {tokens_given}: what comes after has no effect."
    return {
        "code": TRUNCATED,
        "field": field,
        "detail": detail,
        "tokens_given": tokens_given,
        "tokens_read": tokens_read,
    }


def ignored(guidance: float) -> dict[str, Any]:
    """Of a negative prompt that the model does not look at."""
    why = (
        f"has no effect at guidance {guidance:g}, only above 1"
        if guidance <= 1
        else "has no effect on this model"
    )
    return {"code": IGNORED, "field": "negative_prompt", "detail": f"negative_prompt {why}."}
