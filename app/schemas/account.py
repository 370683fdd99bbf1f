"""Define documents of tenants with their limits, keys and usage, for tenants and for operators."""

from datetime import date
from typing import Annotated, Literal
from uuid import UUID

from pydantic import Field

from app.schemas.base import Instant, Page, document, one_of, says
from policy.limits import SCOPES

Scopes = Annotated[list[Annotated[str, one_of(SCOPES)]], says("What the key may do.")]


@document("The limits of a tenant; null means no limit.")
class Limits:
    requests_per_minute: Annotated[int | None, says("The most requests of any kind in a minute.")]
    megapixel_steps_per_minute: Annotated[
        float | None, says("Megapixel-steps that its budget regains each minute.")
    ]
    burst_megapixel_steps: Annotated[
        float | None, says("The most megapixel-steps that its budget holds.")
    ]
    max_concurrent_jobs: Annotated[int | None, says("The most jobs that have not ended.")]
    daily_megapixel_steps: Annotated[float | None, says("The most megapixel-steps of a day (UTC).")]
    monthly_megapixel_steps: Annotated[
        float | None, says("The most megapixel-steps of a month (UTC).")
    ]
    monthly_budget: Annotated[
        float | None, says("What it plans to spend in a month (UTC); it is told of, not kept.")
    ]
    allowed_tiers: Annotated[list[str] | None, says("The tiers that it may use.")]
    allowed_models: Annotated[list[str] | None, says("The models that it may use.")]
    max_stored_bytes: Annotated[int | None, says("The most bytes of uploaded pictures.")]
    url_inputs: Annotated[bool, says("Whether its requests may name pictures by URL.")]


@document("The key that sends the request, with its tenant and the tenant's limits.")
class OwnKey:
    id: UUID
    object: Literal["key"] = "key"
    tenant_id: Annotated[UUID, says("The tenant.")]
    actor: Annotated[str, says("How the audit log names the key.")]
    scopes: Scopes
    limits: Limits


@document("What a tenant used on one day.")
class UsageDay:
    day: Annotated[date, says("The day, in UTC.")]
    jobs_accepted: Annotated[int, says("Jobs that were accepted on this day.")]
    jobs_succeeded: Annotated[int, says("How many of these have succeeded.")]
    reserved_megapixel_steps: Annotated[float, says("Of jobs that have not ended yet.")]
    settled_megapixel_steps: Annotated[float, says("Of jobs that succeeded.")]
    abandoned_megapixel_steps: Annotated[float, says("Of canceled jobs: the part that was done.")]
    cost: Annotated[str, says("The cost of the day's jobs, as a decimal number.")]


@document("What a tenant used, by UTC days.")
class Usage:
    object: Literal["usage"] = "usage"
    since: Annotated[date, Field(serialization_alias="from"), says("The first day.")]
    until: Annotated[date, Field(serialization_alias="to"), says("The last day.")]
    currency: Annotated[str, says("The currency of the costs.")]
    data: Annotated[list[UsageDay], says("The days on which jobs were accepted.")]


@document("How much of its quotas a tenant has used.")
class UsedNow:
    today: Annotated[float, says("Megapixel-steps of this day (UTC).")]
    this_month: Annotated[float, says("Megapixel-steps of this month (UTC).")]
    active_jobs: Annotated[int, says("Jobs that have not ended.")]


@document("The pictures that a tenant has stored.")
class StoredFiles:
    count: Annotated[int, says("The number of pictures.")]
    size_bytes: Annotated[int, says("The size of all together.")]


@document("What your tenant used, by UTC days, with its limits and its present use.")
class OwnUsage(Usage):
    limits: Limits
    used_megapixel_steps: UsedNow
    stored_files: StoredFiles


@document("What a tenant used, by UTC days.")
class TenantUsage(Usage):
    tenant_id: Annotated[UUID, says("The tenant.")]


@document("A tenant.")
class Tenant:
    id: UUID
    object: Literal["tenant"] = "tenant"
    name: Annotated[str, says("The name, which no other tenant has.")]
    weight: Annotated[
        float, says("Its share of device time while several tenants wait; 1 is usual.")
    ]
    created_at: Annotated[Instant, says("When it was created.")]
    limits: Limits


@document("Tenants, newest first.")
class TenantPage(Page):
    data: Annotated[list[Tenant], says("The tenants of this page.")]


@document("An API key, without its secret part, which is never shown again.")
class Key:
    id: UUID
    object: Literal["key"] = "key"
    kid: Annotated[str, says("The public part of the key.")]
    name: Annotated[str, says("The name that was given to the key.")]
    scopes: Scopes
    created_at: Annotated[Instant | None, says("When it was issued.")]
    expires_at: Annotated[Instant | None, says("The key is refused from then on.")]
    revoked_at: Annotated[Instant | None, says("When it was revoked.")]
    last_used_at: Annotated[Instant | None, says("When it was last used, to within some minutes.")]


@document("A new key, which is shown only in this answer.")
class IssuedKey(Key):
    key: Annotated[str, says("The whole key, for `Authorization: Bearer`.")]


@document("A new key in place of an old one; it is shown only in this answer.")
class RotatedKey(IssuedKey):
    former_key_id: Annotated[UUID, says("The id of the old key.")]
    former_key_lives_for_s: Annotated[float, says("For so many seconds the old key still works.")]


@document("Keys, oldest first.")
class KeyPage(Page):
    data: Annotated[list[Key], says("The keys.")]
