"""Warn a tenant of parts of an accepted job that have no effect. Pure."""

from typing import Any

from policy.fleet import OPEN_FAMILIES, Model
from policy.params import Resolved
from policy.steps import rows_taken

TRUNCATED = "prompt_truncated"  # the text encoder of the model cuts the end off
IGNORED = "negative_prompt_ignored"


def expected(model: Model, job: Resolved) -> list[dict[str, Any]]:
    """List warnings that are known before the job is rendered.

    The length of a text in tokens is known to the workers alone, which hold the tokenizers.
    """
    if model.family in OPEN_FAMILIES or not job.negative_prompt.strip():
        return []
    rows = rows_taken(model, guidance=job.guidance, negative_prompt=job.negative_prompt)
    return [ignored(job.guidance)] if rows == 1 else []


def unread(field: str, *, tokens_given: int, tokens_read: int, guidance: float) -> dict[str, Any]:
    """Warn of a text of which the model reads only the first `tokens_read` tokens."""
    if tokens_read == 0 and field == "negative_prompt":
        return ignored(guidance)
    detail = (
        f"{field} has {tokens_given} tokens; the model reads the first {tokens_read}, and the rest"
        " has no effect."
    )
    return {
        "code": TRUNCATED,
        "field": field,
        "detail": detail,
        "tokens_given": tokens_given,
        "tokens_read": tokens_read,
    }


def ignored(guidance: float) -> dict[str, Any]:
    """Warn of a negative prompt that has no effect."""
    why = "has no effect on this model"
    if guidance <= 1:
        why = f"has no effect at guidance {guidance:g}; it needs guidance above 1"
    return {"code": IGNORED, "field": "negative_prompt", "detail": f"negative_prompt {why}."}
