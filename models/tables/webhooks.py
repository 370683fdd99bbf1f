"""Define the tables of webhook endpoints, deliveries, and the attempts at these."""

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column, relationship

from models.ids import new_id
from models.tables.base import NOW, Base, listed
from policy.states import DeliveryState


class WebhookEndpoint(Base):
    """A URL that a tenant's events are posted to, while it is neither disabled nor deleted."""

    __tablename__ = "webhook_endpoints"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=new_id)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    url: Mapped[str]
    description: Mapped[str] = mapped_column(server_default=text("''"), default="")
    events: Mapped[list[str]]  # the types it wants
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    disabled_at: Mapped[datetime | None]
    # Gone (its receiver answered 410), or the tenant's own choice.
    disabled_reason: Mapped[str | None]
    deleted_at: Mapped[datetime | None]
    # Its last attempt took long.
    is_slow: Mapped[bool] = mapped_column(server_default=text("false"), default=False)

    secrets: Mapped[list["WebhookSecret"]] = relationship(
        order_by="WebhookSecret.created_at", lazy="raise"
    )

    __table_args__ = (
        Index(
            "webhook_endpoints_live",
            "tenant_id",
            postgresql_where=text("disabled_at IS NULL AND deleted_at IS NULL"),
        ),
        Index("webhook_endpoints_by_tenant", "tenant_id"),
    )


class WebhookSecret(Base):
    """A key that an endpoint's events are signed with; while two are live both sign."""

    __tablename__ = "webhook_secrets"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=new_id)
    endpoint_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("webhook_endpoints.id"))
    secret: Mapped[str]  # whsec_…, as Standard Webhooks writes it
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    expires_at: Mapped[datetime | None]

    __table_args__ = (Index("webhook_secrets_by_endpoint", "endpoint_id"),)


class WebhookDelivery(Base):
    """One event for one endpoint; its id is the webhook-id that every attempt carries."""

    __tablename__ = "webhook_deliveries"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=new_id)
    endpoint_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("webhook_endpoints.id"))
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    event: Mapped[str]
    # None: it tells of no job.
    job_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("jobs.id"))
    data: Mapped[dict[str, Any] | None]  # what it tells, if of no job
    state: Mapped[str] = mapped_column(
        server_default=DeliveryState.PENDING.value, default=DeliveryState.PENDING.value
    )
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    # When to try (again); None once it is over.
    due_at: Mapped[datetime | None] = mapped_column(server_default=NOW)
    claimed_until: Mapped[datetime | None]  # somebody is trying right now
    attempts: Mapped[int] = mapped_column(server_default=text("0"), default=0)
    ended_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint(
            f"state IN {listed(DeliveryState)}", name="webhook_deliveries_state_is_known"
        ),
        CheckConstraint(
            "(state = 'pending') = (due_at IS NOT NULL)",
            name="webhook_deliveries_due_while_pending",
        ),
        Index(
            "webhook_deliveries_due",
            "endpoint_id",
            "due_at",
            postgresql_where=text("state = 'pending'"),
        ),
        Index("webhook_deliveries_by_job", "job_id", postgresql_where=text("state = 'pending'")),
        Index("webhook_deliveries_by_endpoint", "endpoint_id", "id"),
        Index(
            "webhook_deliveries_claimed",
            "endpoint_id",
            "claimed_until",
            postgresql_where=text("claimed_until IS NOT NULL"),
        ),
        Index("webhook_deliveries_by_age", "created_at"),
        Index("webhook_deliveries_of_job", "job_id", postgresql_where=text("job_id IS NOT NULL")),
    )


class WebhookAttempt(Base):
    """One try at a delivery, with its answer, or the reason why there is none."""

    __tablename__ = "webhook_attempts"

    delivery_id: Mapped[uuid.UUID] = mapped_column(
        ForeignKey("webhook_deliveries.id", ondelete="CASCADE"), primary_key=True
    )
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[datetime] = mapped_column(server_default=NOW)
    status: Mapped[int | None]  # HTTP; None: no answer
    error: Mapped[str | None]
    took_s: Mapped[float]
