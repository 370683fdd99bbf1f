"""Limit what Postgres logs of the application: that a statement failed, but no text of a tenant.

The settings belong to roles, not to a database: no dump carries them, so every run of the
migrations checks them.
"""

from collections.abc import Callable

from sqlalchemy import Engine, text
from sqlalchemy.exc import ProgrammingError

# Settings of the roles whose statements carry prompts. By default Postgres logs a statement that
# fails, is slow, or waits for a lock as a whole, and the row that a constraint refuses; parameters
# are part of the statement, for the driver puts them in.
QUIET = {
    "log_statement": "none",
    "log_min_duration_statement": "-1",
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
}

# Roles of the application, with the settings that each has.
_ROLES = """
    SELECT r.rolname, coalesce(s.setconfig, '{}') FROM pg_roles r
    LEFT JOIN pg_db_role_setting s ON s.setrole = r.oid AND s.setdatabase = 0
    WHERE r.rolname LIKE 'darkroom\\_%' AND NOT r.rolsuper AND r.rolname <> current_user
    ORDER BY r.rolname
"""


def keep_prompts_out_of_logs(engine: Engine, say: Callable[[str], None]) -> None:
    """Set the roles of the application so that Postgres logs only that their statements failed.

    Only a superuser may; for another user it says what to run.
    """
    wanted = {f"{name}={value}" for name, value in QUIET.items()}
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for role, settings in connection.execute(text(_ROLES)).all():
            if wanted <= set(settings):
                continue
            statements = [
                f"ALTER ROLE {role} SET {name} = '{value}'" for name, value in QUIET.items()
            ]
            try:
                for statement in statements:
                    connection.exec_driver_sql(statement)
            except ProgrammingError:
                why = "Postgres may log prompts of statements that fail; have a superuser run:"
                say(f"{why} {'; '.join(statements)}")
