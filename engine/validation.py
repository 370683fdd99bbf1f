"""Check every field of a request that a caller can get wrong, before anything is queued.

Types and ranges that hold for every family are here; what one checkpoint cannot render, its family
says (`Family.check`).
"""

import math

from engine.config import CheckpointSpec
from engine.errors import UnsupportedRequest
from engine.request import AdapterUse, Determinism, Fork, ImageRequest, Picture


def check_values(request: ImageRequest) -> None:
    """Raise `UnsupportedRequest`, naming the field, for a value that no checkpoint takes."""
    for name in ("id", "group", "owner", "policy_version", "prompt", "negative_prompt"):
        _check_text(name, getattr(request, name))
    _check_numbers(request)
    if not isinstance(request.may_skip_blocks, bool):
        raise UnsupportedRequest("may_skip_blocks", f"{request.may_skip_blocks!r} is no yes or no")
    for name in ("init_image", "mask", "control_image"):
        if not isinstance(getattr(request, name), Picture | None):
            raise UnsupportedRequest(name, "is not a picture")
    if not all(isinstance(use, AdapterUse) for use in request.adapters):
        raise UnsupportedRequest("adapters", "is not a tuple of adapters in use")
    if not isinstance(request.fork, Fork | None):
        raise UnsupportedRequest("fork", "is not a fork")
    for step in request.keep_steps:
        check_integer("keep_steps", step)
        if not 0 < step < request.num_steps:
            reason = f"{step} is not within 1..{request.num_steps - 1}"
            raise UnsupportedRequest("keep_steps", reason)
    for name, option in request.options.items():
        if not isinstance(name, str) or not isinstance(option, str | int | float | bool):
            raise UnsupportedRequest("options", f"{name!r} is not a plain value under a name")


def _check_numbers(request: ImageRequest) -> None:
    for name in ("width_px", "height_px", "num_steps", "seed", "rank", "clip_skip"):
        check_integer(name, getattr(request, name))
    for name, value in (("guidance", request.guidance), ("strength", request.noise_share)):
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise UnsupportedRequest(name, f"{value!r} is not a finite number from 0 up")
    if not 0 <= request.seed < 2**63:
        raise UnsupportedRequest("seed", f"{request.seed} is not within 0..2**63-1")


def check_offered(request: ImageRequest, spec: CheckpointSpec) -> None:
    """Raise `UnsupportedRequest` for a size or sampler that is not offered of this checkpoint."""
    if (request.width_px, request.height_px) not in spec.sizes:
        sizes = ", ".join(f"{width}x{height}" for width, height in spec.sizes)
        raise UnsupportedRequest(
            "width_px", f"{request.width_px}x{request.height_px} is none of {sizes}"
        )
    if request.sampler not in spec.samplers:
        raise UnsupportedRequest(
            "sampler", f"{request.sampler!r} is none of {', '.join(spec.samplers)}"
        )
    if request.adapters and not spec.adapters:
        raise UnsupportedRequest("adapters", "none are offered of this checkpoint")


def check_rows(request: ImageRequest, rows: int, max_batch_rows: int) -> None:
    """Raise `UnsupportedRequest` when the image's rows do not fit a forward, or its bucket."""
    if request.determinism not in tuple(Determinism):
        raise UnsupportedRequest(
            "determinism", f"{request.determinism!r} is none of {', '.join(Determinism)}"
        )
    if request.is_reproducible:
        if request.bucket_rows is None:
            raise UnsupportedRequest("bucket_rows", "a reproducible image needs one")
        check_integer("bucket_rows", request.bucket_rows)
        if not rows <= request.bucket_rows <= max_batch_rows:
            raise UnsupportedRequest(
                "bucket_rows", f"{request.bucket_rows} is not within {rows}..{max_batch_rows}"
            )
    elif rows > max_batch_rows:
        raise UnsupportedRequest(
            "guidance", f"takes {rows} rows of a forward; this engine makes {max_batch_rows}"
        )


def _check_text(field: str, value: object) -> None:
    if not isinstance(value, str):
        raise UnsupportedRequest(field, "is not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UnsupportedRequest(field, "is not valid Unicode") from None


def check_seconds(field: str, value: object) -> None:
    """Raise `UnsupportedRequest` for what is no number of seconds.

    A negative one is a moment that has passed.
    """
    if not isinstance(value, int | float) or math.isnan(value):
        raise UnsupportedRequest(field, f"{value!r} is not a number of seconds")


def check_integer(field: str, value: object) -> None:
    """Raise `UnsupportedRequest` for what is no integer; True and False are none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise UnsupportedRequest(field, f"{value!r} is not an integer")
