"""Bring the database up to date, and let the application and the auditor log in.

MIGRATION_DATABASE_URL is the owner's; the users and passwords of DATABASE_URL and AUDITOR_DATABASE_URL are given to the
roles that the migrations made. An owner's URL in their place is left as it is.
"""

import sys

from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

import migrations
from settings import MigrationSettings, load, refuse

ROLES = {"database_url": "darkroom_app", "auditor_database_url": "darkroom_auditor"}


def main() -> None:
    settings = load(MigrationSettings)
    try:
        migrations.upgrade(settings.migration_database_url, say=_say)
        _let_all_in(settings)
    except migrations.MigrationFailed as error:
        sys.exit(f"migrations: {error}")
    except DBAPIError as error:
        sys.exit(f"migrations: Postgres: {' '.join(str(error.orig).split())}")


def _let_all_in(settings: MigrationSettings) -> None:
    owner = make_url(settings.migration_database_url).username
    for field, role in ROLES.items():
        url = getattr(settings, field)
        user = make_url(url) if url else None
        if user is None or user.username == owner:
            continue
        if user.username != role:
            refuse([f"settings: {field.upper()}: its user is {user.username!r}; accepted: {role!r}, or the owner"])
        _let_in(settings.migration_database_url, role, str(user.password or ""))


def _say(line: str) -> None:
    print(f"migrations: {line}", flush=True)


def _let_in(owner_url: str, role: str, password: str) -> None:
    engine = create_engine(owner_url)
    with engine.begin() as connection:
        literal = connection.execute(text("SELECT quote_literal(:password)"), {"password": password}).scalar_one()
        connection.exec_driver_sql(f"ALTER ROLE {role} LOGIN PASSWORD {literal}".replace("%", "%%"))
    engine.dispose()


if __name__ == "__main__":
    main()
