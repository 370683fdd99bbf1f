"""tenants, keys, usage: what an operator sets by them holds at the gateway.

What they show is what the gateway counts by.
"""

import csv
import json
import re
import time
import uuid
from decimal import Decimal

import pytest
from click.testing import CliRunner

from cli.bill import COLUMNS
from cli.main import darkroom
from cli.sql import ask
from tests.builders import fleet_text

NOBODY = "00000000-0000-0000-0000-000000000000"


@pytest.fixture(autouse=True)
def _no_installation_of_the_callers(monkeypatch):
    for name in ("DARKROOM_URL", "DARKROOM_API_KEY", "DARKROOM_DATA_DIR", "FLEET_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tenant(stack) -> str:
    """The name of a tenant that has nothing yet."""
    name = f"cli-{uuid.uuid4().hex[:8]}"
    assert run(stack, "tenants", "create", name).exit_code == 0
    return name


@pytest.fixture
def as_key(stack):
    """Run a command with an API key other than the stack's own."""
    return lambda key, *arguments: run(stack, *arguments, env={"DARKROOM_API_KEY": key})


def run(stack, *arguments, **options):
    return CliRunner().invoke(
        darkroom, ["--data-dir", str(stack.data_dir), *map(str, arguments)], **options
    )


def shown_limits(stack, name) -> dict[str, str]:
    """What `tenants show` prints, line by line."""
    lines = run(stack, "tenants", "show", name).stdout.splitlines()[1:]
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines)


def issued(stack, *options) -> tuple[str, str]:
    """A new key, and its id."""
    done = run(stack, "keys", *options)
    assert done.exit_code == 0, done.stderr
    return done.stdout.strip(), done.stderr.split()[1].rstrip(";")


def test_limits_are_set_shown_and_taken_away_again(stack, tenant):
    budget = ["megapixel_steps_per_minute=50", "burst_megapixel_steps=200.5"]
    stocks = [
        "requests_per_minute=600",
        "max_concurrent_jobs=20",
        "daily_megapixel_steps=0",
        "monthly_megapixel_steps=1e5",
        "monthly_budget=500",
    ]
    may = [
        "allowed_tiers=fast, batch",
        "allowed_models=pocket",
        "max_stored_bytes=5000000000",
        "url_inputs=true",
    ]

    assert run(stack, "tenants", "limit", tenant, *budget, *stocks, *may).exit_code == 0
    limited = shown_limits(stack, tenant)
    assert (
        run(
            stack,
            "tenants",
            "limit",
            tenant,
            *(f"{limit.partition('=')[0]}=none" for limit in [*budget, *stocks, *may]),
        ).exit_code
        == 0
    )
    unlimited = shown_limits(stack, tenant)

    assert limited == {
        "requests_per_minute": "600",
        "megapixel_steps_per_minute": "50.0",
        "burst_megapixel_steps": "200.5",
        "max_concurrent_jobs": "20",
        "daily_megapixel_steps": "0.000000",
        "monthly_megapixel_steps": "100000.000000",
        "monthly_budget": "500.000000",
        "allowed_tiers": "fast,batch",
        "allowed_models": "pocket",
        "max_stored_bytes": "5000000000",
        "url_inputs": "true",
        "megapixel-steps used today": "0",
        "and this month": "0",
        "jobs under way": "0",
        "pictures stored": "0",
        "and their bytes": "0",
    }
    assert {unlimited[limit] for limit in limited if "_" in limit} == {"none", "false"}


@pytest.mark.parametrize(
    ("limit", "takes"),
    [
        ("requests_per_minute=0", "a whole number above 0, at most 1000000000, or none"),
        ("requests_per_minute=1.5", "a whole number above 0"),
        ("requests_per_minute=", "a whole number above 0"),
        ("max_concurrent_jobs=many", "a whole number above 0"),
        ("max_concurrent_jobs=9999999999", "a whole number above 0, at most 1000000000"),
        ("megapixel_steps_per_minute=-5", "a number from 0.001, at most 100000000000, or none"),
        ("burst_megapixel_steps=inf", "a number from 0.001"),
        ("daily_megapixel_steps=-1", "a number from 0"),
        ("monthly_megapixel_steps=nan", "a number from 0"),
        (
            "allowed_tiers=fast,express",
            "one or more of fast, quality, batch, with commas between them, or none; not 'express'",
        ),
        ("allowed_tiers=", "one or more of fast, quality, batch"),
        (
            "allowed_models=dall-e-3",
            "one or more of pocket, with commas between them, or none; not 'dall-e-3'",
        ),
        ("max_stored_bytes=-1", "a whole number from 0, at most 1000000000000000, or none"),
        ("url_inputs=yes", "true or false; not 'yes'"),
    ],
)
def test_a_limit_that_cannot_be_is_named_with_what_it_takes(stack, tenant, limit, takes):
    before = shown_limits(stack, tenant)

    done = run(stack, "tenants", "limit", tenant, "requests_per_minute=60", limit)

    assert done.exit_code == 2
    assert f"Error: {limit.partition('=')[0]} takes {takes}" in done.stderr
    assert shown_limits(stack, tenant) == before


def test_an_unknown_limit_is_refused_with_the_known_ones(stack, tenant):
    for words in ("requests=5", "url_inputs"):
        done = run(stack, "tenants", "limit", tenant, words)

        assert (done.exit_code, f"'{words}' is not limit=value" in done.stderr) == (2, True)
        assert "requests_per_minute, megapixel_steps_per_minute" in done.stderr


def test_a_rate_of_megapixel_steps_needs_its_burst(stack, tenant):
    done = run(stack, "tenants", "limit", tenant, "megapixel_steps_per_minute=50")

    assert done.exit_code == 2
    assert (
        "megapixel_steps_per_minute and burst_megapixel_steps are set, and taken away, together"
        in done.stderr
    )


def test_the_tiers_and_models_that_may_be_allowed_are_those_of_the_fleet_file(
    stack, tenant, tmp_path
):
    own = tmp_path / "own.toml"
    own.write_text(fleet_text())

    shipped = run(stack, "tenants", "limit", tenant, "allowed_models=large")
    done = run(stack, "--fleet-file", own, "tenants", "limit", tenant, "allowed_models=large")

    assert (shipped.exit_code, done.exit_code) == (2, 0)
    assert shown_limits(stack, tenant)["allowed_models"] == "large"


def test_a_limit_that_is_set_holds_at_the_gateway_within_a_second(stack, tenant, as_key):
    key, _ = issued(stack, "issue", "--tenant", tenant)
    assert (
        as_key(
            key, "generate", "a red circle", "--tier", "fast", "-o", stack.data_dir / "limited.png"
        ).exit_code
        == 0
    )

    run(stack, "tenants", "limit", tenant, "allowed_tiers=batch")
    time.sleep(1)

    refused = as_key(key, "generate", "a red circle", "--tier", "fast")
    assert (refused.exit_code, "Forbidden" in refused.stderr) == (4, True)


def test_a_name_is_one_tenant_s(stack, tenant):
    again = run(stack, "tenants", "create", tenant)

    assert (again.exit_code, f"A tenant named '{tenant}' exists already." in again.stderr) == (
        4,
        True,
    )
    assert [line.split()[1] for line in run(stack, "tenants", "list").stdout.splitlines()].count(
        tenant
    ) == 1


def test_a_tenant_that_is_not_there_has_neither_limits_nor_keys_nor_usage(stack):
    limited = run(stack, "tenants", "limit", "nobody", "requests_per_minute=5")
    shown = run(stack, "tenants", "show", "nobody")
    used = run(stack, "usage", "--tenant", "nobody")
    key = run(stack, "keys", "issue", "--tenant", "nobody")

    assert [done.exit_code for done in (limited, shown, used, key)] == [4, 4, 2, 2]
    for done in (limited, shown, used, key):
        assert "here is no tenant 'nobody'" in done.stderr


def test_a_key_may_do_what_its_scopes_say(stack, tenant, as_key):
    reads, _ = issued(stack, "issue", "--tenant", tenant, "--scope", "read")
    generates, _ = issued(stack, "issue", "--tenant", tenant, "--scope", "generate")

    read = (as_key(reads, "jobs"), as_key(reads, "estimate", "a red circle"))
    generated = (as_key(generates, "jobs"), as_key(generates, "estimate", "a red circle"))

    assert as_key(reads, "generate", "a red circle").exit_code == 4
    assert [done.exit_code for done in (*read, *generated)] == [0, 0, 4, 0]
    assert "scope" in generated[0].stderr
    unknown = run(stack, "keys", "issue", "--tenant", tenant, "--scope", "root")
    assert (unknown.exit_code, "admin" in unknown.stderr) == (2, True)


def test_a_key_expires_when_it_was_told_to(stack, tenant, as_key):
    moment = 0.3 / 86_400
    gone, gone_id = issued(stack, "issue", "--tenant", tenant, "--expires-in-days", moment)
    lives, lives_id = issued(stack, "issue", "--tenant", tenant, "--expires-in-days", 2)
    time.sleep(0.4)

    refused = as_key(gone, "jobs")

    assert (refused.exit_code, "Unauthenticated" in refused.stderr) == (4, True)
    assert as_key(lives, "jobs").exit_code == 0
    query = (
        "SELECT round(extract(epoch FROM expires_at - created_at) / 86400, 2) FROM api_keys "
        "WHERE id = ANY(%s::uuid[]) ORDER BY 1"
    )
    assert [
        float(days)
        for (days,) in ask(stack.env["MIGRATION_DATABASE_URL"], query, [[gone_id, lives_id]]).rows
    ] == [0.0, 2.0]
    assert run(stack, "keys", "issue", "--tenant", tenant, "--expires-in-days", 0).exit_code == 2


def test_a_rotated_key_has_a_successor_of_the_same_name_and_scopes_and_lives_on_for_a_while(
    stack, tenant, as_key
):
    old, old_id = issued(stack, "issue", "--tenant", tenant, "--name", "web", "--scope", "read")

    new, new_id = issued(stack, "rotate", old_id)

    assert new != old
    assert (as_key(old, "jobs").exit_code, as_key(new, "jobs").exit_code) == (0, 0)
    query = """SELECT id::text, name, scopes,
                      round(extract(epoch FROM expires_at - clock_timestamp()) / 3600)::integer
               FROM api_keys WHERE id = ANY(%s::uuid[]) ORDER BY created_at"""
    rows = ask(stack.env["MIGRATION_DATABASE_URL"], query, [[old_id, new_id]]).rows
    assert rows == [(old_id, "web", ["read"], 24), (new_id, "web", ["read"], None)]


def test_a_key_rotated_without_grace_is_refused_within_a_second(stack, tenant, as_key):
    old, old_id = issued(stack, "issue", "--tenant", tenant)
    assert as_key(old, "jobs").exit_code == 0

    new, _ = issued(stack, "rotate", old_id, "--grace-hours", 0)
    time.sleep(1)

    assert (as_key(old, "jobs").exit_code, as_key(new, "jobs").exit_code) == (4, 0)
    for gone in (old_id, NOBODY):
        again = run(stack, "keys", "rotate", gone)
        assert (again.exit_code, f"no valid key with the id {gone}" in again.stderr) == (2, True)


def used(stack, *options) -> dict[str, list[str]]:
    """What `usage` prints: the cells of each line, by its first one."""
    done = run(stack, "usage", *options)
    assert done.exit_code == 0, done.output
    lines = [re.split(r"\s{2,}", line.strip()) for line in done.stdout.splitlines()[1:]]
    return {line[0]: line[1:] for line in lines}


def test_usage_is_told_by_days_with_a_total(stack, tenant, as_key, tmp_path):
    query = """INSERT INTO usage_ledger
                      (tenant_id, day, reserved, settled, jobs_accepted, jobs_succeeded, cost)
               SELECT id, (clock_timestamp() AT TIME ZONE 'UTC')::date - 2, 0.5, 1.25, 4, 2, 0.125
               FROM tenants WHERE name = %s
               RETURNING day::text, (day + 2)::text"""
    earlier, today = ask(stack.env["MIGRATION_DATABASE_URL"], query, [tenant]).rows[0]
    key, _ = issued(stack, "issue", "--tenant", tenant)
    assert (
        as_key(
            key,
            "generate",
            "a red circle",
            "--tier",
            "fast",
            "--steps",
            4,
            "-o",
            tmp_path / "out.png",
        ).exit_code
        == 0
    )

    days = used(stack, "--tenant", tenant, "--days", 3)

    cost = ask(
        stack.env["AUDITOR_DATABASE_URL"],
        "SELECT cost FROM usage_by_tenant_day WHERE tenant = %s AND day = %s",
        [tenant, today],
    )
    [(cost_today,)] = cost.rows
    assert list(days) == [earlier, today, "total"]
    assert days[earlier] == ["4", "2", "0.500000", "1.250000", "0.000000", "0.125000 USD"]
    assert days[today] == ["1", "1", "0.000000", "0.065536", "0.000000", f"{cost_today:.6f} USD"]
    assert days["total"] == [
        "5",
        "3",
        "0.500000",
        "1.315536",
        "0.000000",
        f"{cost_today + Decimal('0.125'):.6f} USD",
    ]
    assert list(used(stack, "--tenant", tenant, "--days", 2)) == [today, "total"]
    [charge] = billed(stack, "--month", today[:7], "--tenant", tenant)
    assert Decimal(charge["BilledCost"]) == cost_today > 0
    assert charge["ChargePeriodStart"] == f"{today}T00:00:00Z"
    assert charge["BillingPeriodStart"] == f"{today[:7]}-01T00:00:00Z"
    assert (charge["BillingAccountName"], charge["ConsumedQuantity"]) == (tenant, "1")
    assert charge["ChargeClass"] == "", "null: it corrects no earlier charge"
    assert json.loads(charge["Tags"]) == {"model": "pocket", "tier": "fast"}


def billed(stack, *options) -> list[dict[str, str]]:
    """What `bill` writes, row by row."""
    done = run(stack, "bill", *options, "-")
    assert done.exit_code == 0, done.output
    return list(csv.DictReader(done.stdout.splitlines()))


def test_bill_of_a_tenant_without_images_has_no_row_and_goes_into_a_file(stack, tenant, tmp_path):
    file = tmp_path / "bill.csv"

    assert run(stack, "bill", "--tenant", tenant, file).exit_code == 0

    assert file.read_text() == ",".join(COLUMNS) + "\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--month", "2026-13"), "'2026-13' is not a month such as 2026-11"),
        (("--tenant", "nobody"), "there is no tenant 'nobody'"),
    ],
)
def test_bill_of_no_month_or_nobody_is_a_wrong_command_line(stack, options, said):
    done = run(stack, "bill", *options, "-")

    assert (done.exit_code, said in done.stderr) == (2, True)


def test_a_tenant_that_used_nothing_has_a_total_of_nothing(stack, tenant):
    assert used(stack, "--tenant", tenant) == {
        "total": ["0", "0", "0.000000", "0.000000", "0.000000", "0.000000 USD"]
    }


def test_usage_of_no_day_at_all_is_a_wrong_command_line(stack):
    assert run(stack, "usage", "--days", 0).exit_code == 2
