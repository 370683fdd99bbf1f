"""Grant each kind of process what it may do with the tables.

There is a role for each kind, and grants are applied anew after every migration.

    darkroom_owner      owns the tables; migrates, and nothing else
    darkroom_app        the operator: everything the processes below may do together
                        (command line, one login for all of it)
    darkroom_gateway    what requests need: not the secrets that webhooks are signed with
    darkroom_worker     what rendering needs: no key, no webhook address, no key of a stored object
    darkroom_results    what storing needs: no prompt
    darkroom_sweeper    what sweeping needs: no prompt, no key
    darkroom_webhooks   what delivering needs: no prompt, and no change of a job
    darkroom_auditor    views only

Migrations grant to the operator what a new table needs. This module says what each process gets of
it, table by table, and a test checks that no table is left out; a column that is added to a table
later is treated like its others. Grants are computed, so that they can say "all columns but these".
Every view is for the operator and the auditor; FUNCTIONS says which roles may call what.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, text

from migrations import living

OPERATOR = "darkroom_app"
AUDITOR = "darkroom_auditor"
KINDS = ("gateway", "worker", "results", "sweeper", "webhooks")
OF_PROCESS = {kind: f"darkroom_{kind}" for kind in KINDS}


@dataclass(frozen=True)
class May:
    """Privileges on one table.

    only: on these columns; but: on all columns but these; neither: on the table.
    """

    table: str
    privileges: str
    only: tuple[str, ...] = ()
    but: tuple[str, ...] = ()


TENANT_TEXTS = ("prompt", "negative_prompt", "metadata")  # what tenants write
IDENTITY = (
    "id",
    "tenant_id",
    "api_key_id",
    "accepted_at",
    "usage_day",
    "megapixel_steps",
    "steps_per_image",
    "currency",
)

# Privileges of every process that changes a job's state: see `finish` in models/jobs.py.
_MOVES_JOBS = (
    May("jobs", "UPDATE", but=(*TENANT_TEXTS, *IDENTITY)),
    May("images", "SELECT, UPDATE"),
    May("attempts", "SELECT, UPDATE"),
    May("flows", "SELECT, INSERT, UPDATE"),
    May("fair_clocks", "SELECT, INSERT, UPDATE"),
    May("usage_ledger", "SELECT, INSERT, UPDATE"),
    May("tenants", "SELECT", only=("id", "name", "weight")),
    May("workers", "SELECT"),
    May(
        "webhook_endpoints",
        "SELECT",
        only=("id", "tenant_id", "events", "disabled_at", "deleted_at", "is_slow"),
    ),
    May("webhook_deliveries", "SELECT, INSERT"),
    May("audit_events", "INSERT"),
)

GRANTS: dict[str, tuple[May, ...]] = {
    "gateway": (
        May("fleet_revisions", "SELECT"),
        May("tenants", "SELECT, INSERT, UPDATE"),
        May("api_keys", "SELECT, INSERT, UPDATE"),
        May("jobs", "SELECT, INSERT, UPDATE"),
        May("job_labels", "SELECT"),
        May("images", "SELECT, INSERT, UPDATE"),
        May("attempts", "SELECT, UPDATE"),
        May("artifacts", "SELECT, UPDATE"),
        May("files", "SELECT, INSERT, UPDATE"),
        May("stored_files", "SELECT, INSERT, UPDATE"),
        May("uploads", "SELECT, INSERT, UPDATE, DELETE"),
        May("flows", "SELECT, INSERT, UPDATE"),
        May("fair_clocks", "SELECT, INSERT, UPDATE"),
        May("usage_ledger", "SELECT, INSERT, UPDATE"),
        May("idempotency_keys", "SELECT, INSERT, UPDATE, DELETE"),
        May("learnt_costs", "SELECT"),
        May("learnt_etas", "SELECT"),
        May("workers", "SELECT"),
        May("capabilities", "SELECT"),
        May("webhook_endpoints", "SELECT, INSERT, UPDATE"),
        May("webhook_secrets", "SELECT", but=("secret",)),
        May("webhook_secrets", "INSERT"),
        May("webhook_secrets", "UPDATE", only=("expires_at",)),
        May("webhook_deliveries", "SELECT, INSERT, UPDATE"),
        May("webhook_attempts", "SELECT"),
        May("audit_events", "INSERT"),
    ),
    "worker": (
        *_MOVES_JOBS,
        May("fleet_revisions", "SELECT"),
        May("jobs", "SELECT"),
        May("attempts", "INSERT"),
        May("workers", "INSERT, UPDATE, DELETE"),
        May("lost_devices", "SELECT, INSERT, UPDATE"),
        May("device_time", "SELECT, INSERT, UPDATE"),
        May("capabilities", "SELECT, INSERT, UPDATE"),
        May("learnt_costs", "SELECT, INSERT, UPDATE"),
    ),
    "results": (
        *_MOVES_JOBS,
        May("fleet_revisions", "SELECT"),
        May("jobs", "SELECT", but=TENANT_TEXTS),
        May("artifacts", "SELECT, INSERT"),
        May("files", "SELECT"),
        May("uploads", "SELECT, INSERT, UPDATE, DELETE"),
    ),
    "sweeper": (
        *_MOVES_JOBS,
        May("tenants", "SELECT", only=("monthly_budget",)),
        May("budget_alerts", "SELECT, INSERT"),
        May("slo_targets", "SELECT, INSERT, UPDATE, DELETE"),
        May("slo_counts", "SELECT, INSERT, UPDATE, DELETE"),
        May("slo_attainment", "SELECT"),
        May("fleet_revisions", "SELECT"),
        May("jobs", "SELECT", but=TENANT_TEXTS),
        May("workers", "DELETE"),
        May("lost_devices", "SELECT"),
        May("learnt_costs", "SELECT, INSERT, UPDATE"),
        May("learnt_etas", "SELECT, INSERT, UPDATE"),
        # To empty prompts that are older than their tier keeps them; never to read them.
        May("jobs", "UPDATE", only=TENANT_TEXTS),
        May("artifacts", "SELECT, UPDATE"),
        May("files", "SELECT"),
        May("uploads", "SELECT, INSERT, UPDATE, DELETE"),
        May("idempotency_keys", "SELECT", only=("tenant_id", "key", "created_at")),
        May("idempotency_keys", "UPDATE", only=("created_at",)),  # locking a row asks for it
        May("idempotency_keys", "DELETE"),
        May("webhook_deliveries", "UPDATE, DELETE"),
        May("webhook_attempts", "SELECT, DELETE"),
        May("queue_now", "SELECT"),
    ),
    "webhooks": (
        May("fleet_revisions", "SELECT"),
        # A tenant's own metadata are part of a delivery.
        May("jobs", "SELECT", but=("prompt", "negative_prompt")),
        May("images", "SELECT"),
        May("attempts", "SELECT"),
        May("artifacts", "SELECT"),
        May("webhook_endpoints", "SELECT"),
        May("webhook_endpoints", "UPDATE", only=("disabled_at", "disabled_reason", "is_slow")),
        May("webhook_secrets", "SELECT"),
        May("webhook_deliveries", "SELECT, UPDATE"),
        May("webhook_attempts", "SELECT, INSERT"),
        May("audit_events", "INSERT"),
    ),
}

# Tables that no process but the migrations touches, and why that is right.
NOBODYS = {
    "audit_chains": "written by the trigger of audit_events alone",
    "audit_checkpoints": "the owner's, who prunes",
    "alembic_version": "the migrations' own",
    "living_sql": "the migrations' own",
}

# Functions that not every role may call, with those that may, besides the owner. Maintenance is the
# sweeper's.
FUNCTIONS = {
    "audit_verify": (OPERATOR, AUDITOR, OF_PROCESS["sweeper"]),
    "audit_verify_since": (OPERATOR, AUDITOR, OF_PROCESS["sweeper"]),
    "audit_ensure_partitions": (OPERATOR, OF_PROCESS["sweeper"]),
    "audit_prune_month": (),
}

_CREATE = """
DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{0}') THEN CREATE ROLE {0} NOLOGIN; END IF;
EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
END $$
"""


def create(connection: Connection) -> None:
    """Make the roles that are missing.

    They belong to the whole server and cannot log in until they are given a password.
    """
    for role in (OPERATOR, AUDITOR, *OF_PROCESS.values()):
        connection.execute(text(_CREATE.format(role)))


def grant(connection: Connection) -> None:
    """Give every kind of process what GRANTS says, and revoke everything else.

    Give the operator and the auditor the views, and the roles that FUNCTIONS names its functions.
    """
    columns = _columns(connection)
    for kind, role in OF_PROCESS.items():
        _grant_tables(connection, GRANTS[kind], role, columns)
    views = [each.name for each in living.read() if each.kind == "view"]
    connection.execute(text(f"GRANT SELECT ON {', '.join(views)} TO {OPERATOR}, {AUDITOR}"))
    for function, allowed in FUNCTIONS.items():
        revoke = f"REVOKE ALL ON FUNCTION {function} FROM PUBLIC, {OPERATOR}, {AUDITOR}"
        connection.execute(text(revoke))
        if allowed:
            to_allowed = f"GRANT EXECUTE ON FUNCTION {function} TO {', '.join(allowed)}"
            connection.execute(text(to_allowed))


def _grant_tables(
    connection: Connection, granted: Sequence[May], role: str, columns: dict[str, list[str]]
) -> None:
    """Give the role these rights on the tables that exist, and no others."""
    statements = [
        f"REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {role}",
        f"REVOKE ALL ON ALL FUNCTIONS IN SCHEMA public FROM {role}",
        f"GRANT USAGE ON SCHEMA public TO {role}",
        *(_statement(may, role, columns) for may in granted if may.table in columns),
    ]
    for statement in statements:
        connection.execute(text(statement))


def revoke_all(connection: Connection) -> None:
    """Revoke every right of the roles in this database."""
    for role in (OPERATOR, AUDITOR, *OF_PROCESS.values()):
        connection.execute(text(f"DROP OWNED BY {role}"))


def _statement(may: May, role: str, columns: dict[str, list[str]]) -> str:
    if not may.only and not may.but:
        return f'GRANT {may.privileges} ON "{may.table}" TO {role}'
    names: Sequence[str] = may.only or [name for name in columns[may.table] if name not in may.but]
    listed = ", ".join(f'"{name}"' for name in names if name in columns[may.table])
    each = ", ".join(f"{privilege} ({listed})" for privilege in may.privileges.split(", "))
    return f'GRANT {each} ON "{may.table}" TO {role}'


def _columns(connection: Connection) -> dict[str, list[str]]:
    query = (
        "SELECT table_name, column_name FROM information_schema.columns"
        " WHERE table_schema = 'public'"
    )
    rows = connection.execute(text(query))
    found: dict[str, list[str]] = {}
    for table, column in rows:
        found.setdefault(table, []).append(column)
    return found
