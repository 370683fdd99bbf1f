"""Define documents of liveness and readiness."""

from typing import Annotated, Literal, NotRequired

from pydantic import with_config
from typing_extensions import TypedDict

from app.schemas.base import described, document, says


@document("The process answers.")
class Health:
    status: Annotated[Literal["alive"], says("That it answers.")] = "alive"


@with_config(described("A part of the installation."))
class Part(TypedDict):
    ready: Annotated[bool, says("Whether it can be reached and does its work.")]
    detail: NotRequired[Annotated[str, says("Why it is not ready.")]]
    live: NotRequired[Annotated[int, says("Of workers: how many are live.")]]


@document("Whether jobs can be accepted.")
class Readiness:
    status: Annotated[Literal["ready", "not_ready"], says("Whether jobs can be accepted.")]
    degraded: Annotated[list[str], says("The parts that are away.")]
    parts: Annotated[dict[str, Part], says("Every part, by name.")]
