"""Translate OpenAI's image requests to our parameters.

Pure: it sees fields and fleet.toml, no pictures.

How OpenAI's Python client 3.57 sends requests: every field of a multipart body is a string, also
numbers and booleans. `extra_body` arrives as further fields; our own parameters come that way.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from app.http.body import check_bounds, check_metadata
from app.problems import InvalidImageRequest, ModelNotFound, NotOffered
from policy.fleet import OPEN_FAMILIES, Family, Fleet, parse_size
from policy.formats import FORMATS
from policy.offers import find_model, tiers_offered
from policy.params import OPENAI_REQUEST, RequestedAdapter, RequestedParams
from policy.refusals import InvalidParam
from policy.routing import ANYBODY, Asker
from policy.text import is_human

GENERATION = "image_generation"
EDIT = "image_edit"
VARIATION = "image_variation"
MOST_IMAGES = 10
MOST_PARTIALS = 3
MOST_USER_CHARS = 512
VARIATION_STRENGTH = 0.6  # high enough to differ, low enough to be recognised
PICTURES = ("image", "image[]", "mask", "mask[]")  # the files of a form, and how clients name them
SPREAD = ("adapters[][name]", "adapters[][strength]")
QUALITIES = ("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd")
RESPONSE_FORMATS = ("b64_json", "url")
MODERATIONS = ("auto", "low")
STYLES = ("natural", "vivid")
FIDELITIES = ("high", "low")
_TOO_LARGE = 1e300  # for a number; converting a larger int to a float would overflow later
_DALL_E = ("dall-e-2", "dall-e-3")
_SAID_AS = {"standard": "medium", "hd": "high"}  # answers have only the newer names
_NOT_DONE = {
    "svg": "images are not vector graphics",
    "frame_count": "images are not animated",
    "frame_duration_ms": "images are not animated",
    "complexity": "no model takes it",
    "markup": "no model takes it; use a mask",
}


@dataclass(frozen=True, kw_only=True)
class ImageCall:
    """A parsed image call; its `requested` has no pictures yet.

    keeps_running: do not cancel the job when the client leaves its stream.
    """

    kind: str
    requested: RequestedParams
    metadata: Mapping[str, str]
    as_url: bool
    streams: bool
    partial_images: int
    keeps_running: bool
    quality: str
    user: str | None

    @property
    def event(self) -> str:
        """Return the prefix of the names of the stream's events."""
        return EDIT if self.kind == EDIT else GENERATION


def read(kind: str, fields: Mapping[str, Any], fleet: Fleet, asker: Asker = ANYBODY) -> ImageCall:
    """Parse and check the fields. Raises InvalidImageRequest, NotOffered, ModelNotFound."""
    said = _FormFields({name: value for name, value in fields.items() if value is not None})
    for name in said.names() & _NOT_DONE.keys():
        raise NotOffered(f"{name} is not offered: {_NOT_DONE[name]}.", parameter=name)
    _check_formats(said)
    _check_names(kind, said)
    streams = said.boolean("stream", False)
    count = said.number("n", 1, 1, MOST_IMAGES)
    if streams and (count != 1 or kind == VARIATION):
        raise NotOffered(
            "`stream` is only for one image: use n=1. Variations cannot be streamed.",
            parameter="stream",
        )
    quality = said.one_of("quality", "auto", QUALITIES)
    answers_url = not streams and _is_of_dall_e(said, quality)
    keeps_running = _is_boolean(said.get("background")) and said.boolean("background", False)
    default_format = "url" if answers_url else "b64_json"
    asked = ImageCall(
        kind=kind,
        requested=_requested_params(kind, said, fleet, _asked(said, fleet, asker), count, quality),
        metadata=_metadata(said),
        as_url=said.one_of("response_format", default_format, RESPONSE_FORMATS) == "url",
        streams=streams,
        partial_images=said.number("partial_images", 0, 0, MOST_PARTIALS),
        keeps_running=keeps_running,
        quality=_SAID_AS.get(quality, quality),
        user=_user(said),
    )
    if streams and asked.as_url:
        raise NotOffered(
            "`stream` sends the image itself: it cannot be combined with response_format=url.",
            parameter="response_format",
        )
    return asked


def _check_names(kind: str, said: "_FormFields") -> None:
    """Raise InvalidImageRequest for a field that no such request has."""
    unknown = said.names() - KNOWN_FIELDS
    if unknown or (kind == VARIATION and "mask" in said.names()):
        name = min(unknown) if unknown else "mask"
        raise InvalidImageRequest.at(
            name[:64], "is not a field of this request", accepted=sorted(KNOWN_FIELDS)
        )


def gathered(form: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Convert the fields of a form to those of a JSON body. Raises InvalidImageRequest.

    The client spreads adapters over `adapters[][name]` and `adapters[][strength]`. Any other
    repeated field is refused, because one of its values would be ignored.
    """
    for name, values in form.items():
        if name in PICTURES and any(values):
            raise InvalidImageRequest.at(
                name.removesuffix("[]"),
                "must be a file of the form; in a body of JSON it may be a data URL",
            )
        if name not in SPREAD and name not in PICTURES and len(values) > 1:
            raise InvalidImageRequest.at(name[:64], f"is given {len(values)} times; give it once")
    plain = {name: values[0] for name, values in form.items() if name not in SPREAD + PICTURES}
    return plain | _read_adapters(form)


def _read_adapters(form: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the field `adapters` of a JSON body; nothing if the form names none."""
    names = form.get("adapters[][name]", ())
    strengths = form.get("adapters[][strength]", ())
    if strengths and len(strengths) != len(names):  # which name each belongs to is unknown
        raise InvalidImageRequest.at(
            "adapters", "in a form need a name each, and a strength each or none at all"
        )
    if not names:
        return {}
    with_strength = zip(names, strengths or ["1"] * len(names), strict=True)
    return {"adapters": [{"name": name, "strength": strength} for name, strength in with_strength]}


def tier_of(quality: str, fleet: Fleet, tiers: Collection[str]) -> str | None:
    """Return the tier for a quality, one of `tiers`; None for the one of a request that names none.

    Low is the tier with the fewest default steps, high and above the one with the most.
    """
    by_rank = [tier for tier in fleet.tiers_by_rank if tier in tiers]
    if quality == "low":
        return min(by_rank, key=lambda tier: fleet.tiers[tier].default_steps, default=None)
    if quality in ("high", "xhigh", "max", "hd"):
        # Of tiers with as many steps, max() takes the first, which has the best rank.
        return max(by_rank, key=lambda tier: fleet.tiers[tier].default_steps, default=None)
    return None


def steps_of(quality: str, fleet: Fleet, model: str, tiers: Sequence[str]) -> int | None:
    """Return the steps for a quality in its tier; None for the tier's default.

    tiers: in which the model is offered, the default in front.  Medium takes the geometric mean of
    the steps of low and high, so that the three differ even where low and medium share a tier.
    """
    if quality not in ("medium", "standard") or not tiers:
        return None
    low, high = (
        fleet.default_steps(model, tier_of(end, fleet, tiers) or tiers[0])
        for end in ("low", "high")
    )
    return min(round(math.sqrt(low * high)), fleet.tiers[tiers[0]].max_steps)


def nearest_size(sizes: tuple[str, ...], width_px: int, height_px: int) -> str:
    """Return the offered size whose shape, and then whose area, is nearest to a picture's."""

    def distance(size: str) -> tuple[float, float]:
        width, height = parse_size(size)
        shape = abs(math.log(width / height) - math.log(width_px / height_px))
        return round(shape, 3), abs(math.log(width * height) - math.log(width_px * height_px))

    return min(sizes, key=distance)


class _FormFields:
    """The fields of a request, of JSON or a form; reads each as the type that it should have.

    Values of JSON are used as they are; those of a form are parsed from text.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def names(self) -> set[str]:
        return {
            name.partition("[")[0] if name.startswith(("metadata[", "svg[")) else name
            for name in self._fields
        }

    def get(self, name: str) -> Any:
        return self._fields.get(name)

    def items(self) -> Mapping[str, Any]:
        return self._fields

    def text(self, name: str, default: str | None) -> str | None:
        value = self._fields.get(name, default)
        if value is not None and not isinstance(value, str):
            raise InvalidImageRequest.at(name, "must be text")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self._fields.get(name, default)
        if not _is_boolean(value):
            raise InvalidImageRequest.at(name, "must be true or false", accepted=[True, False])
        return value if isinstance(value, bool) else str(value).lower() == "true"

    def number(self, name: str, default: int, low: int, high: int) -> int:
        value = self._parsed(name, default, int, "a whole number")
        if not low <= value <= high:
            raise InvalidImageRequest.at(
                name, f"must be from {low} to {high}", accepted={"min": low, "max": high}
            )
        return int(value)

    def plain(self, name: str, kind: Any) -> Any:
        """Read a field as `kind`, a type of `RequestedParams` without its None.

        None for a missing field.
        """
        if name not in self._fields:
            return None
        if kind is int:
            return self._parsed(name, None, int, "a whole number")
        if kind is float:
            return self._parsed(name, None, float, "a number")
        if kind == tuple[RequestedAdapter, ...]:
            entries = self.structure(name, list, [])
            return tuple(_adapter(place, entry) for place, entry in enumerate(entries))
        return self.text(name, None)

    def one_of(self, name: str, default: str, accepted: tuple[str, ...]) -> str:
        value = self.text(name, default)
        if value not in accepted:
            raise InvalidImageRequest.at(
                name, f"{str(value)[:32]!r} is not offered", accepted=list(accepted)
            )
        return value

    def structure(self, name: str, kind: type, default: Any) -> Any:
        """Read a list or an object; in a form it is JSON in a string."""
        value = self._fields.get(name, default)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise InvalidImageRequest.at(name, "is not JSON") from None
        if not isinstance(value, kind):
            raise InvalidImageRequest.at(
                name, f"must be {'a list' if kind is list else 'an object'}"
            )
        assert isinstance(value, list | dict)
        check_bounds(value, problem=InvalidImageRequest)
        return value

    def _parsed(self, name: str, default: Any, kind: Callable[[str], Any], what: str) -> Any:
        value = self._fields.get(name, default)
        if isinstance(value, str):
            value = _number_of(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # 1.0 is a whole number
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = is_number and abs(value) < _TOO_LARGE
        if not fits or (kind is int and not isinstance(value, int)):
            raise InvalidImageRequest.at(name, f"must be {what}")
        return value


def _without_none(hint: Any) -> Any:
    """Return `int` for `int | None`, and any other type unchanged."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return next(kind for kind in kinds if kind is not NoneType)


_EXTRAS = {param.member for param in OPENAI_REQUEST if param.member is not None}
_KINDS = {name: _without_none(hint) for name, hint in get_type_hints(RequestedParams).items()}
_OURS = _EXTRAS | {"metadata"}
_THEIRS = {"prompt", "model", "n", "size", "quality", "output_format", "output_compression"}
_THEIRS |= {"background", "moderation", "stream", "partial_images", "response_format", "style"}
_THEIRS |= {"user", "safety_identifier", "input_fidelity"}
KNOWN_FIELDS = _OURS | _THEIRS


def _is_of_dall_e(said: _FormFields, quality: str) -> bool:
    """Tell whether the request was written for DALL-E: by its model, or by values of that time.

    Newer models of OpenAI refuse those values. Such a request gets URLs by default, as from OpenAI:
    programs of that time cannot read anything else.
    """
    return said.get("model") in _DALL_E or quality in ("standard", "hd") or "style" in said.names()


def _check_formats(said: _FormFields) -> None:
    """Refuse values of OpenAI's interface that this gateway does not offer."""
    if (output := said.text("output_format", "png")) not in FORMATS:
        raise NotOffered(
            f"output_format {str(output)[:16]!r} is not offered; accepted: {', '.join(FORMATS)}.",
            parameter="output_format",
        )
    background = said.get("background")
    is_offered = background in (None, "auto", "opaque") or _is_boolean(background)
    if not is_offered:
        detail = (
            "No model makes transparent backgrounds. `background` may be auto or opaque; or true,"
            " to keep a streamed job running when the client disconnects."
        )
        raise NotOffered(detail, parameter="background")
    if said.number("output_compression", 100, 0, 100) != 100:
        raise NotOffered(
            "`output_compression` can only be 100: files are written at one quality.",
            parameter="output_compression",
        )
    said.one_of("moderation", "auto", MODERATIONS)
    said.one_of("style", "natural", STYLES)
    said.one_of("input_fidelity", "high", FIDELITIES)


@dataclass(frozen=True)
class _Asked:
    """The model that a request names, or its default.  tiers: in which the key may have it."""

    model: str
    family: Family
    tiers: tuple[str, ...]


def _asked(said: _FormFields, fleet: Fleet, asker: Asker) -> _Asked:
    """Find the model. Raises InvalidImageRequest, ModelNotFound."""
    try:
        name, version = find_model(fleet, said.text("model", None), asker)
    except InvalidParam as error:
        detail = f"The model {error.detail}."
        raise ModelNotFound(detail, parameter="model", accepted=error.accepted) from None
    model = fleet.model_ids[name]
    tiers = tiers_offered(fleet, model, asker, version=version)
    return _Asked(model, fleet.models[model].family, tiers)


def _requested_params(
    kind: str, said: _FormFields, fleet: Fleet, asked: _Asked, count: int, quality: str
) -> RequestedParams:
    if kind != VARIATION and "prompt" not in said.names():
        raise InvalidImageRequest.at("prompt", "is required")
    size = said.text("size", "auto")
    extras = _extras(said)
    if not extras["tier"]:
        extras["tier"] = tier_of(quality, fleet, asked.tiers)
        if extras["steps"] is None:
            extras["steps"] = steps_of(quality, fleet, asked.model, asked.tiers)
    completed = _complete_extras(extras, kind, asked.family, has_prompt=bool(said.get("prompt")))
    return RequestedParams(
        prompt=said.text("prompt", "") or "",
        model=said.text("model", None),
        size=None if size == "auto" else size,
        n=count,
        output_format=said.text("output_format", "png") or "png",
        **completed,
    )


def _complete_extras(
    extras: dict[str, Any], kind: str, family: Family, *, has_prompt: bool
) -> dict[str, Any]:
    """Fill in what a variation needs.

    How much a pipeline changes a picture by itself is its own affair.  Raises InvalidImageRequest
    for what has no effect.
    """
    completed = dict(extras)
    if kind == VARIATION:
        # With an empty prompt, guidance would double the work and change nothing.
        if extras["guidance"] is None and not has_prompt:
            completed["guidance"] = 1.0
        if extras["strength"] is None and family not in OPEN_FAMILIES:
            completed["strength"] = VARIATION_STRENGTH
    elif kind == GENERATION and extras["strength"] is not None:
        raise InvalidImageRequest.at(
            "strength", "needs a picture: use it with /v1/images/edits or /v1/images/variations"
        )
    return completed


def _extras(said: _FormFields) -> dict[str, Any]:
    """Read our own parameters, the fields of `RequestedParams`, with defaults for missing ones."""
    found: dict[str, Any] = {}
    for field in fields(RequestedParams):
        if field.name in _EXTRAS:
            value = said.plain(field.name, _KINDS[field.name])
            found[field.name] = field.default if value is None else value
    return found


def _adapter(place: int, entry: Any) -> RequestedAdapter:
    has_its_fields = isinstance(entry, dict) and entry.keys() <= {"name", "strength"}
    if not has_its_fields or not isinstance(entry.get("name"), str):
        raise InvalidImageRequest.at(f"adapters/{place}", 'must be {"name": …, "strength": …}')
    place_of_it = f"adapters/{place}/strength"
    strength = _FormFields({place_of_it: entry.get("strength", 1.0)}).plain(place_of_it, float)
    return RequestedAdapter(entry["name"], 1.0 if strength is None else float(strength))


def _metadata(said: _FormFields) -> Mapping[str, str]:
    """Read the metadata: an object, or the form fields `metadata[key]` that clients make of it."""
    spread = {
        name[9:-1]: value
        for name, value in said.items().items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    metadata = spread or said.structure("metadata", dict, {})
    if not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidImageRequest.at("metadata", "must map text to text")
    check_metadata(metadata)
    return metadata


def _user(said: _FormFields) -> str | None:
    """Return the end user that the tenant names; it is stored as metadata."""
    for name in ("safety_identifier", "user"):
        if user := said.text(name, None):
            if len(user) > MOST_USER_CHARS or not is_human(user):
                raise InvalidImageRequest.at(
                    name,
                    "is too long or has control characters",
                    accepted={"max_chars": MOST_USER_CHARS},
                )
            return user
    return None


def _number_of(text: str) -> int | float | None:
    """Parse a number of a form; None if the text is no number."""
    if len(text) > 32 or not text.isascii():
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool) or (
        isinstance(value, str) and value.lower() in ("true", "false")
    )
