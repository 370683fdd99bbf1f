"""A process and a database that are not in UTC: days, instants and quotas are those of UTC."""

import time
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import create_engine, make_url, text

from models import api_keys, usage
from models.database import make_engine, transaction
from tests.app.conftest import bearer
from tests.builders import a_tenant, a_zone_of_another_day, until


@pytest.fixture
def far_away(stack, monkeypatch):
    """Be this process, and what connects to the database from now on, where it is another day."""
    zone, url = a_zone_of_another_day(), make_url(stack.env["MIGRATION_DATABASE_URL"])
    owner = create_engine(url, isolation_level="AUTOCOMMIT")
    with owner.connect() as connection:
        connection.execute(text(f"ALTER DATABASE {url.database} SET timezone TO '{zone}'"))
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    yield zone
    monkeypatch.undo()
    time.tzset()
    with owner.connect() as connection:
        connection.execute(text(f"ALTER DATABASE {url.database} RESET timezone"))
    owner.dispose()


@pytest.fixture
def tenant(far_away, a_house):
    """A tenant of a gateway that was opened there."""
    return a_house().with_workers().tenant()


def test_far_away_it_is_another_day(far_away, stack):
    with create_engine(stack.env["MIGRATION_DATABASE_URL"]).connect() as connection:
        there = connection.scalar(text("SELECT clock_timestamp()::date"))

    assert datetime.now().date() == there != datetime.now(UTC).date()


def test_usage_is_booked_shown_and_counted_by_utc_days_wherever_one_is(tenant):
    today = datetime.now(UTC).date()
    tenant.post()

    told = tenant.get({"urls": {"self": "/v1/usage"}})

    assert (told["from"], told["to"]) == (today.replace(day=1).isoformat(), today.isoformat())
    assert [day["day"] for day in told["data"]] == [today.isoformat()]
    assert told["used_megapixel_steps"]["today"] == told["data"][0]["reserved_megapixel_steps"] > 0


def test_instants_are_told_in_utc_wherever_one_is(tenant):
    job = tenant.post().json
    tenant.send(job["urls"]["cancel"], {})
    endpoint = tenant.send("/v1/webhooks", {"url": "https://example.com/"}).json
    key = tenant.get({"urls": {"self": "/v1/key"}})

    shown = tenant.get(job)

    told = [job["created_at"], job["start_by"], shown["created_at"], shown["finished_at"]]
    told += [endpoint["created_at"]]
    assert key["object"] == "key"
    for instant in told:
        assert instant.endswith("+00:00"), instant
        assert datetime.fromisoformat(instant) > datetime.now(UTC) - timedelta(minutes=10)
    assert job["created_at"] == shown["created_at"]


def test_jobs_are_found_by_instants_of_any_zone_wherever_one_is(tenant):
    job = tenant.post().json
    at = datetime.fromisoformat(job["created_at"]).astimezone(UTC)

    def found(**between) -> int:
        query = "&".join(f"{name}={when:%Y-%m-%dT%H:%M:%SZ}" for name, when in between.items())
        return len(tenant.get({"urls": {"self": f"/v1/jobs?{query}"}})["data"])

    second = timedelta(seconds=1)
    assert found(created_after=at - second, created_before=at + 2 * second) == 1
    assert found(created_after=at + 2 * second) == found(created_before=at - second) == 0


@pytest.mark.usefixtures("far_away")
def test_a_key_expires_at_the_instant_that_was_said(gateway_with, stack, stack_database):
    client = gateway_with(max_wait_s=51)
    at = datetime.now(UTC) + timedelta(seconds=2)
    with transaction(stack_database) as session:
        tenant = a_tenant(session)
        own = {"tenant_id": tenant.id, "name": "tests", "expires_at": at, "actor": "tests"}
        _, key = api_keys.issue(session, **own, pepper=stack.env["API_KEY_PEPPER"])

    def status() -> int:
        return client.get("/v1/jobs", headers=bearer(key)).status_code

    assert status() == 200
    until(lambda: status() == 401, within_s=60)
    assert datetime.now(UTC) >= at


def test_the_ledger_s_day_ends_at_midnight_of_utc_wherever_one_is(far_away, stack):
    engine = make_engine(stack.env["DATABASE_URL"], pool_size=1)
    tomorrow = datetime.now(UTC).replace(hour=0, minute=0, second=0) + timedelta(days=1)
    with transaction(engine) as session:
        tenant_id = session.scalar(text("SELECT id FROM tenants LIMIT 1"))
        totals = usage.usage_totals(session, tenant_id=tenant_id, count_jobs_to=None)
        zone = session.scalar(text("SHOW timezone"))
    engine.dispose()

    left_s = (tomorrow - datetime.now(UTC)).total_seconds()
    assert totals.day_ends_in_s == pytest.approx(left_s, abs=30)
    assert zone == "UTC"
