"""Warn a tenant of parts of an accepted job that have no effect. Pure."""

from typing import Any

from policy.capabilities import Capabilities
from policy.fleet import OPEN_FAMILIES, Model, ModelTier
from policy.params import Resolved
from policy.steps import rows_taken

TRUNCATED = "prompt_truncated"  # the text encoder of the model cuts the end off
IGNORED = "negative_prompt_ignored"
GUIDANCE_IGNORED = "guidance_ignored"
CODES = (TRUNCATED, IGNORED, GUIDANCE_IGNORED)


def expected(model: Model, job: Resolved, able: Capabilities | None = None) -> list[dict[str, Any]]:
    """List warnings that are known before the job is rendered.

    able: what its checkpoint can do; None: nobody knows yet, then the model's family tells.  The
    length of a text in tokens is known to the workers alone, which hold the tokenizers.
    """
    found = []
    if job.negative_prompt.strip() and not _reads_negative_prompt(model, job, able):
        found.append(ignored(job.guidance))
    if able is not None and job.guidance != _default_guidance(model, job):  # it was asked for
        needs_more = able.guidance == "negated" and not job.negative_prompt
        if able.guidance == "ignored" or needs_more:
            found.append(_guidance_ignored(needs_negative_prompt=needs_more))
    return found


def _reads_negative_prompt(model: Model, job: Resolved, able: Capabilities | None) -> bool:
    if able is not None:
        is_guided = able.negative_prompt == "guided" and job.guidance > 1
        return is_guided or able.negative_prompt == "used"
    if model.family in OPEN_FAMILIES:
        return True
    return rows_taken(model, guidance=job.guidance, negative_prompt=job.negative_prompt) > 1


def _default_guidance(model: Model, job: Resolved) -> float:
    own = model.tiers.get(job.tier, ModelTier()).default_guidance
    return model.default_guidance if own is None else own


def _guidance_ignored(*, needs_negative_prompt: bool) -> dict[str, Any]:
    """Warn of a guidance that has no effect."""
    why = "without a negative prompt" if needs_negative_prompt else "on this model"
    detail = f"guidance has no effect {why}."
    return {"code": GUIDANCE_IGNORED, "field": "guidance", "detail": detail}


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
