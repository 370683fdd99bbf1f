"""Who asks: the tenant, the key that spoke for it, and what was counted of its limits meanwhile."""

from dataclasses import dataclass, field
from uuid import UUID

from edges.limits import Counted, Taken
from policy.limits import Limits


@dataclass
class LimitsUse:
    """What one request has used of the limits that are told in its answer's headers.

    requests: of this minute.  budget: megapixel-steps.  None: not asked for.
    """

    requests: Counted | None = None
    budget: Taken | None = None


@dataclass(frozen=True)
class Caller:
    """A tenant, as one request of it is seen.

    kid: the public id of its key.  actor: how the audit log names it.  used: filled while the request is answered.
    """

    tenant_id: UUID
    api_key_id: UUID
    kid: str
    actor: str
    scopes: frozenset[str]
    limits: Limits
    used: LimitsUse = field(default_factory=LimitsUse, compare=False)
