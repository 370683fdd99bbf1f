"""Monthly budgets: each threshold is told once a month, to the tenant's endpoints that want it."""

from decimal import Decimal

import pytest
from sqlalchemy import select, text

from models import budgets, tenants, webhooks
from models.tables import WebhookDelivery
from policy.webhooks import BUDGET_EVENT
from tests.builders import a_tenant, spend


def told(session, *tenants) -> list[tuple]:
    """What is told now of these tenants: of whom, and of how much."""
    reached = budgets.note_reached_thresholds(session, currency="EUR")
    own = {tenant.id for tenant in tenants}
    return [(one.tenant_id, one.percent) for one in reached if one.tenant_id in own]


def an_endpoint(session, tenant, events):
    shape = {"url": "https://example.com/", "description": "", "secret": "whsec_AAAA"}
    own = {"tenant_id": tenant.id, "events": events}
    endpoint = webhooks.create(session, **own, **shape, actor="tests")
    session.flush()
    return endpoint


def deliveries(session, endpoint) -> list[WebhookDelivery]:
    query = select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint.id)
    return list(session.scalars(query.order_by(WebhookDelivery.id)))


def test_each_threshold_is_told_once_and_of_several_the_highest(session):
    tenant, other = a_tenant(session), a_tenant(session)
    spend(session, other, budget=10, cost=4.99)

    costs = (4.99, 0.01, 2.99, 0.01, 4.0, 90.0)  # 49.9, 50, 79.9, 80, 120, 1,020 %
    heard = []
    for cost in costs:
        spend(session, tenant, budget=10, cost=cost)
        heard.append(told(session, tenant, other))

    assert heard == [[], [(tenant.id, 50)], [], [(tenant.id, 80)], [(tenant.id, 100)], []]
    spend(session, other, budget=10, cost=3.01)
    assert told(session, tenant, other) == [(other.id, 80)], "50 with it"


def test_endpoint_that_wants_it_gets_what_was_spent_and_no_other(session):
    tenant = a_tenant(session)
    wants = an_endpoint(session, tenant, [BUDGET_EVENT])
    ends_only = an_endpoint(session, tenant, ["job.succeeded"])
    strangers = an_endpoint(session, a_tenant(session), [BUDGET_EVENT])
    spend(session, tenant, budget=10, cost=8.5)

    told(session, tenant)

    [delivery] = deliveries(session, wants)
    month = session.scalar(text("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM')"))
    assert delivery.data == {
        "month": month,
        "percent": 80,
        "budget": "10.000000",
        "spent": "8.500000",
        "currency": "EUR",
    }
    assert (delivery.event, delivery.job_id) == (BUDGET_EVENT, None)
    assert [deliveries(session, one) for one in (ends_only, strangers)] == [[], []]


def test_month_begins_with_nothing_spent(session):
    tenant = a_tenant(session)
    spend(session, tenant, budget=10, cost=10)
    session.execute(
        text(
            "UPDATE usage_ledger SET day = date_trunc('month', day)::date - 1 WHERE tenant_id = :id"
        ),
        {"id": tenant.id},
    )

    assert told(session, tenant) == []


@pytest.mark.parametrize("budget", [None, Decimal(0)])
def test_tenant_without_a_budget_is_told_nothing(session, budget):
    tenant = a_tenant(session)
    spend(session, tenant, budget=1, cost=10)
    tenants.limit(session, tenant, changes={"monthly_budget": budget}, actor="tests")

    assert told(session, tenant) == []


def test_tenants_that_have_spent_their_budget_are_counted(session):
    before = budgets.count_over(session)
    for cost in (9.99, 10, 11):
        spend(session, a_tenant(session), budget=10, cost=cost)

    assert budgets.count_over(session) == before + 2
