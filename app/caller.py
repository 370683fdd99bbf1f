"""Describe who sends a request: the tenant, its API key, and the request's use of its limits."""

from dataclasses import dataclass, field
from uuid import UUID

from edges.limits import BudgetResult, RateResult
from policy.limits import Limits


@dataclass
class LimitsUse:
    """The use of limits by one request, as the headers of its answer report it.

    requests: of this minute. budget: megapixel-steps. None: the limit was not checked.
    """

    requests: RateResult | None = None
    budget: BudgetResult | None = None


@dataclass(frozen=True)
class Caller:
    """The tenant and the API key that a request was sent with.

    kid: the public id of its key. actor: its name in the audit log. tenant: the name of its tenant.
    request_id, traceparent: of the request. used: filled in while it is answered.
    """

    tenant_id: UUID
    api_key_id: UUID
    kid: str
    actor: str
    scopes: frozenset[str]
    limits: Limits
    tenant: str = ""
    request_id: str | None = None
    traceparent: str | None = None
    used: LimitsUse = field(default_factory=LimitsUse, compare=False)
