"""What a tenant wrote is in no log, whatever fails: not in ours, and not in Postgres's."""

import uuid

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from migrations.log_settings import QUIET
from models.database import make_engine, transaction
from tests.app.problem import assert_problem
from tests.builders import a_job, until


@pytest.fixture
def owner(stack):
    engine = make_engine(stack.env["MIGRATION_DATABASE_URL"], pool_size=1)
    yield engine
    engine.dispose()


@pytest.fixture
def refused_word(owner):
    """A word that Postgres does not let into a job's prompt: what a bug of ours, or a broken disk, may do to any statement."""
    word = f"unspeakable-{uuid.uuid4().hex}"
    with transaction(owner) as session:
        session.execute(text(f"ALTER TABLE jobs ADD CONSTRAINT tests_refuse CHECK (prompt NOT LIKE '%{word}%') NOT VALID"))
    yield word
    with transaction(owner) as session:
        session.execute(text("ALTER TABLE jobs DROP CONSTRAINT tests_refuse"))


def test_a_prompt_that_postgres_refuses_is_in_no_log(stack, api, refused_word):
    body = {"prompt": f"a portrait of {refused_word}", "tier": "batch", "metadata": {"who": refused_word}}

    answer = api.post("/v1/jobs", json=body)

    assert refused_word not in str(assert_problem(answer, 500, "unexpected"))
    log = stack.log_path("gateway")
    until(lambda: answer.headers["X-Request-Id"] in log.read_text(), what="the gateway's line")
    assert "tests_refuse" in log.read_text()  # it says what went wrong
    until(lambda: "tests_refuse" in stack.log_path("postgres").read_text(), what="Postgres's line")
    for path in (stack.data_dir / "logs").iterdir():
        assert refused_word not in path.read_text(errors="replace"), path.name


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO tenants (id, name, weight) VALUES (gen_random_uuid(), :word, -1)",  # DETAIL: the failing row
        "SELECT nonsuch(:word)",  # LINE 1: the statement
        "SELECT CAST(:word AS integer)",  # the message itself
        "SELECT CAST('{' || :word AS jsonb)",  # CONTEXT
    ],
)
def test_an_error_of_the_database_tells_what_went_wrong_and_not_with_what(owner, statement):
    word = f"unspeakable-{uuid.uuid4().hex}"

    with pytest.raises(SQLAlchemyError) as refusal, transaction(owner) as session:
        session.execute(text(statement), {"word": word})

    assert isinstance(refusal.value, DBAPIError)
    told = f"{refusal.value} {refusal.value.orig} {refusal.value.orig!r}"
    assert word not in told
    assert len(str(refusal.value.orig)) > 10


def test_a_row_that_is_there_twice_is_told_by_its_constraint_and_not_by_its_values(owner):
    def twice():
        with transaction(owner) as session:
            job_id = a_job(session, prompt="unspeakable").id
            session.execute(text("INSERT INTO jobs SELECT * FROM jobs WHERE id = :id"), {"id": job_id})

    with pytest.raises(DBAPIError, match="jobs_pkey") as refusal:
        twice()

    assert "Key (id)" not in str(refusal.value)
    assert refusal.value.orig.diag.constraint_name == "jobs_pkey"


@pytest.mark.parametrize("role", ["DATABASE_URL", "AUDITOR_DATABASE_URL"])
def test_postgres_logs_no_statement_of_the_roles_of_the_application(stack, role):
    engine = make_engine(stack.env[role], pool_size=1)

    with transaction(engine) as session:
        assert {name: session.scalar(text(f"SHOW {name}")) for name in QUIET} == QUIET
    engine.dispose()
