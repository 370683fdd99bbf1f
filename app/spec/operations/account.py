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
        description="Models that you may use, in the shape of OpenAI's list. Their other names come"
        " after them, for programs that look for theirs in the list.",
        answers=(Models,),
    ),
    ("GET", "/v1/models/{name}"): Operation(
        summary="Show a model",
        description="One model, by its id or another name: what it takes, and its defaults.",
        answers=(Model, ModelAlias),
    ),
    ("GET", "/v1/tiers"): Operation(
        summary="List tiers",
        description="Tiers that you may use, in the order in which they are served.",
        answers=(Tiers,),
    ),
    ("GET", "/v1/key"): Operation(
        summary="Show the key that asks",
        description="Its id, its tenant, its scopes, and the tenant's limits.",
        answers=(OwnKey,),
    ),
    ("GET", "/v1/usage"): Operation(
        summary="Show your usage",
        description="Your ledger by UTC days, first and last included, with your limits and"
        f" where you stand. At most {MOST_DAYS + 1} days.",
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
        summary="Ask whether the gateway lives",
        description="Answers as long as the process does.",
        answers=(Health,),
        needs_key=False,
    ),
    ("GET", "/readyz"): Operation(
        summary="Ask whether jobs can be accepted",
        description="200 while they can be, else 503. `degraded` names what is away.",
        answers=(Readiness,),
        failures={503: (Readiness,)},
        needs_key=False,
    ),
    ("GET", "/problems/{slug}"): Operation(
        summary="Explain a type of problem",
        description="What the `type` of a problem means.",
        answers=(ProblemType,),
        needs_key=False,
    ),
}
