"""Describe the operations of models, tiers, /v1/key and /v1/usage, and of the gateway itself."""

from app.http.account import MOST_DAYS
from app.schemas.about import About
from app.schemas.account import OwnKey, OwnUsage
from app.schemas.catalog import Model, ModelAlias, Models, Tiers
from app.schemas.health import Health, Readiness
from app.schemas.problems import ProblemType
from app.spec.operation import DAYS, Operation

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("GET", "/v1/models"): Operation(
        summary="List models",
        description="The models that you may use, in the format of OpenAI's model list. After them,"
        " each alias has an entry of its own, so that a program finds the name that it uses.",
        answers=(Models,),
    ),
    ("GET", "/v1/models/{name}"): Operation(
        summary="Show a model",
        description="A model, by its id or an alias: its sizes, samplers, limits and defaults.",
        answers=(Model, ModelAlias),
    ),
    ("GET", "/v1/tiers"): Operation(
        summary="List tiers",
        description="The tiers that you may use, in the order in which they are served.",
        answers=(Tiers,),
    ),
    ("GET", "/v1/key"): Operation(
        summary="Show your API key",
        description="The id and scopes of the key that sends the request, with its tenant and the"
        " tenant's limits.",
        answers=(OwnKey,),
    ),
    ("GET", "/v1/usage"): Operation(
        summary="Show your usage",
        description="What you used on each UTC day from `from` to `to`, at most"
        f" {MOST_DAYS + 1} days, with your limits and how much of them is used now.",
        answers=(OwnUsage,),
        parameters=DAYS,
    ),
    ("GET", "/v1"): Operation(
        summary="Show which version answers",
        description="The release that this gateway runs, the version of its API, and where the"
        " API is described. It touches no database.",
        answers=(About,),
        needs_key=False,
    ),
    ("GET", "/healthz"): Operation(
        summary="Check that the gateway is running",
        description="Answers 200 as long as the process runs; nothing else is checked.",
        answers=(Health,),
        needs_key=False,
    ),
    ("GET", "/readyz"): Operation(
        summary="Check whether jobs can be accepted",
        description="200 while jobs can be accepted, otherwise 503. `degraded` lists the parts of"
        " the installation that are not ready.",
        answers=(Readiness,),
        failures={503: (Readiness,)},
        needs_key=False,
    ),
    ("GET", "/problems/{slug}"): Operation(
        summary="Explain a problem type",
        description="What the `type` of a problem means, and what to do about it.",
        answers=(ProblemType,),
        needs_key=False,
    ),
}
