"""Define documents of liveness and readiness."""

from typing import Annotated, Literal, NotRequired

from pydantic import with_config
from typing_extensions import TypedDict

from app.schemas.base import described, document, says


@document("The gateway process runs.")
class Health:
    status: Annotated[Literal["alive"], says("Always `alive`.")] = "alive"


@with_config(described("A part of the installation."))
class Part(TypedDict):
    ready: Annotated[bool, says("Whether it can be reached and works.")]
    detail: NotRequired[Annotated[str, says("Why it is not ready.")]]
    live: NotRequired[Annotated[int, says("For workers: how many are running.")]]
    pools: NotRequired[Annotated[dict[str, int], says("For workers: how many run in each pool.")]]
    failing: NotRequired[Annotated[list[str], says("For workers: those that cannot start.")]]
    unserved: NotRequired[
        Annotated[
            list[str],
            says("For workers: versions of models that no worker can load."),
        ]
    ]


@document("Whether jobs can be accepted.")
class Readiness:
    status: Annotated[Literal["ready", "not_ready"], says("Whether jobs can be accepted.")]
    degraded: Annotated[list[str], says("The names of the parts that are not ready.")]
    parts: Annotated[dict[str, Part], says("Every part, by name.")]
