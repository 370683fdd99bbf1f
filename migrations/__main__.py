"""Bring the database up to date, and set the logins of processes, the operator and the auditor.

MIGRATION_DATABASE_URL is the owner's. The users and passwords of DATABASE_URL and
AUDITOR_DATABASE_URL are given to the roles that the migrations made, as are GATEWAY_PASSWORD,
WORKER_PASSWORD and their like. An owner's URL in their place is left as it is.

Exit codes: 0 done; 1 the database refuses, or is away, or is newer than this program; 78 a setting
is wrong.
"""

import sys

from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

import migrations
from migrations import roles
from migrations.errors import MigrationFailed
from settings import MigrationSettings, load, refuse

WRONG_PASSWORD = (
    "Postgres keeps the owner's password from its first start: tell it the new one first, "
    "ALTER ROLE {owner} PASSWORD '...', then start again"
)


def main() -> None:
    settings = load(MigrationSettings)
    owner = make_url(settings.migration_database_url).username or ""
    passwords = _passwords(settings, owner)
    try:
        migrations.upgrade(settings.migration_database_url, say=_say)
        for role, password in passwords.items():
            _let_in(settings.migration_database_url, role, password)
    except MigrationFailed as error:
        sys.exit(f"migrations: {error}")
    except DBAPIError as error:
        reason = " ".join(str(error.orig).split())
        hint = (
            f". {WRONG_PASSWORD.format(owner=owner)}" if "authentication failed" in reason else ""
        )
        sys.exit(f"migrations: Postgres: {reason}{hint}")
    _say(f"logins of {', '.join(passwords) or 'nobody'} set")


def _passwords(settings: MigrationSettings, owner: str) -> dict[str, str]:
    """Collect the password of every role that is to log in."""
    found = {}
    for field, role in (("database_url", roles.OPERATOR), ("auditor_database_url", roles.AUDITOR)):
        url = getattr(settings, field)
        user = make_url(url) if url else None
        if user is None or user.username == owner:
            continue
        if user.username != role:
            refuse(
                [
                    f"settings: {field.upper()}: its user is {user.username!r};"
                    f" accepted: {role!r}, or the owner"
                ]
            )
        found[role] = str(user.password or "")
    for kind, role in roles.OF_PROCESS.items():
        if (password := getattr(settings, f"{kind}_password")) is not None:
            found[role] = password.get_secret_value()
    return found


def _say(line: str) -> None:
    print(f"migrations: {line}", flush=True)


def _let_in(owner_url: str, role: str, password: str) -> None:
    engine = create_engine(owner_url)
    with engine.begin() as connection:
        literal = connection.execute(
            text("SELECT quote_literal(:password)"), {"password": password}
        ).scalar_one()
        connection.exec_driver_sql(f"ALTER ROLE {role} LOGIN PASSWORD {literal}".replace("%", "%%"))
    engine.dispose()


if __name__ == "__main__":
    main()
