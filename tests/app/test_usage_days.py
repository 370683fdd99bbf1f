"""GET /v1/usage: which days may be asked for, and what is told of them."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from models.database import transaction
from tests.app.problem import assert_problem

TODAY = datetime.now(UTC).date()


@pytest.mark.parametrize(
    ("since", "until"),
    [
        (TODAY - timedelta(days=366), TODAY),
        (TODAY, TODAY),
        (TODAY + timedelta(days=1), TODAY + timedelta(days=367)),
    ],
)
def test_usage_is_told_of_up_to_366_days_more_than_the_first(api, since, until):
    told = api.get("/v1/usage", params={"from": since, "to": until}).json()

    assert (told["from"], told["to"]) == (since.isoformat(), until.isoformat())


@pytest.mark.parametrize(
    ("asked", "parameter"),
    [
        ({"from": TODAY - timedelta(days=367), "to": TODAY}, "to"),
        ({"from": TODAY, "to": TODAY - timedelta(days=1)}, "to"),
        ({"from": "2026-13-01"}, "from"),
        ({"to": "20261101"}, "to"),
        ({"to": "2026-11-01T00:00"}, "to"),
    ],
)
def test_usage_of_other_days_is_refused_by_name(api, asked, parameter):
    problem = assert_problem(api.get("/v1/usage", params=asked), 422, "invalid-query")

    assert problem["parameter"] == parameter


def test_usage_tells_every_day_with_its_sums_and_nobody_else_s(new_tenant, stack_database):
    today = datetime.now(UTC).date()  # the day may have changed since this file was read
    tenant, other = new_tenant(), new_tenant()
    for client, factor in ((tenant, 1), (other, 100)):
        tenant_id = client.get("/v1/key").json()["tenant_id"]
        for days in (0, 1, 2):
            day = today - timedelta(days=days)
            row = {"tenant_id": tenant_id, "day": day, "n": factor + days}
            query = """INSERT INTO usage_ledger (tenant_id, day, reserved, settled, abandoned,
                           jobs_accepted, jobs_succeeded, cost)
                       VALUES (:tenant_id, :day, :n, :n + .5, :n + .25, :n + 2, :n + 1, :n + .1)"""
            with transaction(stack_database) as session:
                session.execute(text(query), row)

    asked = {"from": today - timedelta(days=1), "to": today}
    told = tenant.get("/v1/usage", params=asked).json()

    assert told["data"] == [
        {
            "day": (today - timedelta(days=days)).isoformat(),
            "jobs_accepted": 3 + days,
            "jobs_succeeded": 2 + days,
            "reserved_megapixel_steps": 1.0 + days,
            "settled_megapixel_steps": 1.5 + days,
            "abandoned_megapixel_steps": 1.25 + days,
            "cost": f"{1 + days}.100000",
        }
        for days in (1, 0)
    ]
    assert told["used_megapixel_steps"]["today"] == 3 * 1.0 + 0.75
    assert (told["currency"], told["stored_files"]) == ("USD", {"count": 0, "size_bytes": 0})
