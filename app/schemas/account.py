"""Define documents of tenants with their limits, keys and usage, for tenants and for operators."""

from datetime import date
from typing import Annotated, Literal
from uuid import UUID

from pydantic import Field

from app.schemas.base import Instant, Page, document, one_of, says
from policy.limits import SCOPES

Scopes = Annotated[list[Annotated[str, one_of(SCOPES)]], says("What the key may do.")]


@document("What a tenant may use; null is no limit.")
class Limits:
    requests_per_minute: Annotated[int | None, says("Requests of any kind.")]
    megapixel_steps_per_minute: Annotated[float | None, says("At which its budget fills again.")]
    burst_megapixel_steps: Annotated[float | None, says("What its budget holds at most.")]
    max_concurrent_jobs: Annotated[int | None, says("Jobs that have not ended.")]
    daily_megapixel_steps: Annotated[float | None, says("Of each day (UTC).")]
    monthly_megapixel_steps: Annotated[float | None, says("Of each month (UTC).")]
    allowed_tiers: Annotated[list[str] | None, says("Tiers that it may use.")]
    allowed_models: Annotated[list[str] | None, says("Models that it may use.")]
    max_stored_bytes: Annotated[int | None, says("Of pictures that it brought.")]
    url_inputs: Annotated[bool, says("Whether pictures are fetched from URLs for it.")]


@document("The key that asks, its tenant and the tenant's limits.")
class OwnKey:
    id: UUID
    object: Literal["key"] = "key"
    tenant_id: Annotated[UUID, says("The tenant.")]
    actor: Annotated[str, says("How the audit log names the key.")]
    scopes: Scopes
    limits: Limits


@document("A day of a tenant's ledger.")
class UsageDay:
    day: Annotated[date, says("In UTC.")]
    jobs_accepted: Annotated[int, says("Jobs that were accepted on it.")]
    jobs_succeeded: Annotated[int, says("Of these, how many succeeded.")]
    reserved_megapixel_steps: Annotated[float, says("Of jobs that have not ended.")]
    settled_megapixel_steps: Annotated[float, says("Of jobs that succeeded.")]
    abandoned_megapixel_steps: Annotated[float, says("Of jobs that were taken back half done.")]
    cost: Annotated[str, says("The price of its jobs, as a decimal number.")]


@document("A tenant's ledger by days.")
class Usage:
    object: Literal["usage"] = "usage"
    since: Annotated[date, Field(serialization_alias="from"), says("The first day.")]
    until: Annotated[date, Field(serialization_alias="to"), says("The last day.")]
    currency: Annotated[str, says("The currency of the costs.")]
    data: Annotated[list[UsageDay], says("Days on which anything was used.")]


@document("How much of its quotas a tenant has used.")
class UsedNow:
    today: Annotated[float, says("Megapixel-steps of this day (UTC).")]
    this_month: Annotated[float, says("Megapixel-steps of this month (UTC).")]
    active_jobs: Annotated[int, says("Jobs that have not ended.")]


@document("What pictures a tenant has stored.")
class StoredFiles:
    count: Annotated[int, says("How many.")]
    size_bytes: Annotated[int, says("Of all together.")]


@document("The tenant's ledger by days, its limits and where it stands.")
class OwnUsage(Usage):
    limits: Limits
    used_megapixel_steps: UsedNow
    stored_files: StoredFiles


@document("A tenant's ledger by days.")
class TenantUsage(Usage):
    tenant_id: Annotated[UUID, says("The tenant.")]


@document("A tenant.")
class Tenant:
    id: UUID
    object: Literal["tenant"] = "tenant"
    name: Annotated[str, says("Its name, which no other tenant has.")]
    weight: Annotated[float, says("Its share when several tenants wait; 1 is usual.")]
    created_at: Annotated[Instant, says("When it was created.")]
    limits: Limits


@document("Tenants, newest first.")
class TenantPage(Page):
    data: Annotated[list[Tenant], says("The tenants of this page.")]


@document("What is known of a key; the key itself nobody can show.")
class Key:
    id: UUID
    object: Literal["key"] = "key"
    kid: Annotated[str, says("The public part of the key.")]
    name: Annotated[str, says("What its owner calls it.")]
    scopes: Scopes
    created_at: Annotated[Instant | None, says("When it was issued.")]
    expires_at: Annotated[Instant | None, says("It is refused from then on.")]
    revoked_at: Annotated[Instant | None, says("When it was revoked.")]
    last_used_at: Annotated[Instant | None, says("When it last came, to about a minute.")]


@document("A new key, which is shown this once.")
class IssuedKey(Key):
    key: Annotated[str, says("What goes into `Authorization: Bearer`.")]


@document("A new key, which is shown this once, in place of another one.")
class RotatedKey(IssuedKey):
    former_key_id: Annotated[UUID, says("The key before it.")]
    former_key_lives_for_s: Annotated[float, says("So long the one before it is accepted, too.")]


@document("Keys, oldest first.")
class KeyPage(Page):
    data: Annotated[list[Key], says("The keys.")]
