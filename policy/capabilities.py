"""Read what workers publish of a checkpoint, and judge a resolved job by it. Pure.

The engine describes each checkpoint that it has loaded, and checks requests by that description
(engine/capabilities.py); here is the same value as other processes read it. So what is accepted
here the engine renders. Of a checkpoint that no worker has loaded yet the catalogue alone decides,
and of adapters that were not there when it was loaded.

A description names what it is of, so that it does not outlive a version whose weights are others
now. Of two workers that describe one version otherwise, the newest is believed: they differ while
workers are replaced by those of another release or revision of the catalogue, and the newest is the
one that stays.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from policy.fleet import Model
from policy.params import PICTURES, Resolved
from policy.refusals import InvalidParam, within

FORMAT = 1  # what is written in another one is not read: then the catalogue alone decides

Need = Literal["none", "optional", "required"]


class _Value(BaseModel):
    """Members that a newer worker adds are ignored; those that it leaves out have a default."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class SamplerLimits(_Value):
    """The limits of one sampler with the checkpoint's schedule."""

    max_steps: int
    takes_picture: bool = True


class AdapterFacts(_Value):
    """An adapter, as its file describes it."""

    rank: int
    trigger_words: tuple[str, ...] = ()


class Capabilities(_Value):
    """What may be asked of one checkpoint; the members are those of the engine's value."""

    format: int
    source: str = ""  # of which it tells: `source_of`; "": of a worker that does not say
    family: str
    pictures: dict[str, Need]
    samplers: dict[str, SamplerLimits]
    takes_strength: bool = True
    default_strength: float = 1.0
    rounds_steps_up: bool = False
    negative_prompt: Literal["refused", "ignored", "guided", "used"] = "used"
    guidance: Literal["ignored", "negated", "used"] = "used"
    max_clip_skip: int = 0
    rows: int = 1
    rows_guided: int = 1
    prompt_tokens: dict[str, int] = Field(default_factory=dict)
    sizes: tuple[str, ...] = ()
    adapters: dict[str, AdapterFacts] = Field(default_factory=dict)


Known = Mapping[str, Capabilities]  # by checkpoint, as policy.catalog.checkpoint_name names it


def read(value: Any) -> Capabilities | None:
    """Read what a worker published; None if this release does not understand it."""
    try:
        found = Capabilities.model_validate(value)
    except ValidationError:
        return None
    return found if found.format == FORMAT else None


def source_of(model: Model, version: str) -> str:
    """Digest what a version is loaded from, and by which family; "" for one that is gone."""
    for one in model.versions:
        if one.id == version:
            facts = [model.family, model.pipeline_class, one.source, one.sha256]
            return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return ""


def of_version(known: Known, checkpoint: str, model: Model, version: str) -> Capabilities | None:
    """Find what a checkpoint can do; None if no worker has loaded it yet.

    A description of another family or source is of what had the name before.
    """
    able = known.get(checkpoint)
    if able is None or able.family != model.family:
        return None
    return able if able.source in ("", source_of(model, version)) else None


def check_fits(able: Capabilities, model: Model, job: Resolved, *, max_batch_rows: int) -> None:
    """Raise InvalidParam for what the checkpoint cannot render of the job.

    max_batch_rows: of a forward in the job's pool.
    """
    _check_sampler(able, model, job)
    _check_pictures(able, job)
    _check_strength(able, job)
    if job.negative_prompt and able.negative_prompt == "refused":
        raise InvalidParam(
            "negative_prompt", f"is not taken by model {job.model}", {"max_chars": 0}
        )
    if job.clip_skip is not None:
        within("clip_skip", job.clip_skip, 0, able.max_clip_skip, f"model {job.model}")
    _check_rows(able, job, max_batch_rows)


def _check_sampler(able: Capabilities, model: Model, job: Resolved) -> None:
    offered = {name: able.samplers[name] for name in model.samplers if name in able.samplers}
    limits = offered.get(job.sampler)
    if limits is None:
        detail = f"{job.sampler!r} does not fit model {job.model}; {', '.join(offered)} would"
        raise InvalidParam("sampler", detail, list(offered))
    within("steps", job.num_steps, 1, limits.max_steps, f"sampler {job.sampler}")
    if job.init_file_id is not None and not limits.takes_picture:
        taking = [name for name, one in offered.items() if one.takes_picture]
        detail = f"{job.sampler!r} cannot start from an init_image; {', '.join(taking)} can"
        raise InvalidParam("sampler", detail, taking)


def _check_pictures(able: Capabilities, job: Resolved) -> None:
    needs = {role: able.pictures.get(role, "none") for role in PICTURES}
    taken = [role for role, need in needs.items() if need != "none"]
    needed = [role for role, need in needs.items() if need == "required"]
    for role, param in PICTURES.items():
        is_given = getattr(job, param.name) is not None
        if is_given and role not in taken:
            told = f"it takes {', '.join(taken)}" if taken else "it takes no picture"
            raise InvalidParam(role, f"cannot be used with model {job.model}: {told}", taken)
        if not is_given and role in needed:
            detail = f"is needed by model {job.model}, as are all of: {', '.join(needed)}"
            raise InvalidParam(role, detail, needed)


def _check_strength(able: Capabilities, job: Resolved) -> None:
    if job.strength not in (None, 1.0) and not able.takes_strength:
        detail = f"is not taken by model {job.model}; leave it out"
        raise InvalidParam("strength", detail, {"min": 1.0, "max": 1.0})
    share = able.default_strength if job.strength is None else job.strength
    if able.rounds_steps_up or job.num_steps * share >= 1:
        return
    least = math.ceil(1 / share)
    detail = f"must be at least {least}: the strength is {share:g}, and no step would be left"
    raise InvalidParam("steps", detail, {"min": least})


def _check_rows(able: Capabilities, job: Resolved, max_batch_rows: int) -> None:
    rows = able.rows_guided if job.guidance > 1 else able.rows
    room = max_batch_rows if job.bucket_rows is None else job.bucket_rows
    if rows <= room:
        return
    detail = f"takes {rows} rows of a forward, where its workers have {room}"
    field = "tier" if job.bucket_rows is not None else "guidance"
    raise InvalidParam(field, f"{detail} (model {job.model}, tier {job.tier})")
