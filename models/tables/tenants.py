"""Define the tables of tenants with their limits, keys, usage and idempotency keys."""

import uuid
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, Numeric, text
from sqlalchemy.orm import Mapped, mapped_column, relationship

from models.ids import new_id
from models.tables.base import NOW, Base, Megapixels
from policy.limits import DEFAULT_SCOPES, SCOPES


class Tenant(Base):
    """A customer; nobody else can see its ids."""

    __tablename__ = "tenants"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(unique=True)
    # Its share of a tier, against the others'.
    weight: Mapped[float] = mapped_column(server_default=text("1"), default=1.0)
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)

    # Its limits, field by field of policy.limits.Limits; None = no limit.
    requests_per_minute: Mapped[int | None]
    megapixel_steps_per_minute: Mapped[float | None]  # at which its budget fills again
    burst_megapixel_steps: Mapped[float | None]  # what its budget holds at most
    max_concurrent_jobs: Mapped[int | None]  # that are not in a final state
    # By UTC days and months.
    daily_megapixel_steps: Mapped[Decimal | None] = mapped_column(Megapixels)
    monthly_megapixel_steps: Mapped[Decimal | None] = mapped_column(Megapixels)
    # In the fleet's currency.
    monthly_budget: Mapped[Decimal | None] = mapped_column(Numeric(18, 6))
    allowed_tiers: Mapped[list[str] | None]
    allowed_models: Mapped[list[str] | None]
    # Of pictures that it brought and did not erase.
    max_stored_bytes: Mapped[int | None] = mapped_column(BigInteger)
    # May the gateway fetch pictures for it?
    url_inputs: Mapped[bool] = mapped_column(server_default=text("false"), default=False)

    __table_args__ = (
        CheckConstraint("weight > 0", name="tenants_weight_is_positive"),
        CheckConstraint(
            "(megapixel_steps_per_minute IS NULL) = (burst_megapixel_steps IS NULL)",
            name="tenants_budget_has_rate_and_burst",
        ),
        CheckConstraint(
            "least(requests_per_minute, megapixel_steps_per_minute, burst_megapixel_steps,"
            " max_concurrent_jobs) > 0",
            name="tenants_limits_are_positive",
        ),
        CheckConstraint(
            "least(daily_megapixel_steps, monthly_megapixel_steps) >= 0",
            name="tenants_quotas_are_not_negative",
        ),
        CheckConstraint("monthly_budget >= 0", name="tenants_monthly_budget_is_not_negative"),
        CheckConstraint("max_stored_bytes >= 0", name="tenants_max_stored_bytes_is_not_negative"),
    )


class BudgetAlert(Base):
    """A threshold of a tenant's monthly budget that was reached, and told of, in a UTC month."""

    __tablename__ = "budget_alerts"

    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    month: Mapped[date] = mapped_column(primary_key=True)  # its first day
    percent: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    told_at: Mapped[datetime] = mapped_column(server_default=NOW)


class ApiKey(Base):
    """A key as it is stored: its public id and the HMAC of the whole.

    The key itself is shown once.
    """

    __tablename__ = "api_keys"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=new_id)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    kid: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    digest: Mapped[bytes]
    scopes: Mapped[list[str]] = mapped_column(
        server_default=text(f"'{{{','.join(DEFAULT_SCOPES)}}}'"),
        default=lambda: list(DEFAULT_SCOPES),
    )
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]  # give or take five minutes

    tenant: Mapped[Tenant] = relationship(lazy="joined", innerjoin=True)

    __table_args__ = (
        CheckConstraint(
            f"scopes <@ ARRAY{list(SCOPES)} AND scopes <> '{{}}'",
            name="api_keys_scopes_are_known",
        ),
        Index("api_keys_by_tenant", "tenant_id"),
    )


class UsageDay(Base):
    """The ledger of one tenant and UTC day; models/usage.py says what is booked when."""

    __tablename__ = "usage_ledger"

    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    # Megapixel-steps.
    reserved: Mapped[Decimal] = mapped_column(
        Megapixels, server_default=text("0"), default=Decimal(0)
    )
    settled: Mapped[Decimal] = mapped_column(
        Megapixels, server_default=text("0"), default=Decimal(0)
    )
    abandoned: Mapped[Decimal] = mapped_column(
        Megapixels, server_default=text("0"), default=Decimal(0)
    )
    jobs_accepted: Mapped[int] = mapped_column(server_default=text("0"), default=0)
    jobs_succeeded: Mapped[int] = mapped_column(server_default=text("0"), default=0)
    cost: Mapped[Decimal] = mapped_column(server_default=text("0"), default=Decimal(0))  # money


class IdempotencyKey(Base):
    """The answer to a request under an idempotency key of the tenant. Kept for a day.

    So repeating the request is harmless.
    """

    __tablename__ = "idempotency_keys"

    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_sha256: Mapped[str]
    job_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("jobs.id"))
    answer: Mapped[dict[str, Any] | None]  # of a batch: what each item came to
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)

    __table_args__ = (
        Index("idempotency_keys_by_age", "created_at"),
        Index("idempotency_keys_by_job", "job_id", postgresql_where=text("job_id IS NOT NULL")),
    )
