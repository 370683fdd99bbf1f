"""What a tenant wrote is in no log, whatever fails: not in ours, and not in Postgres's."""

import uuid

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from structlog.contextvars import get_contextvars

from migrations.log_settings import QUIET
from models.database import make_engine, transaction
from tests.app.conftest import bearer
from tests.app.problem import assert_problem
from tests.builders import a_job, until


@pytest.fixture
def owner(stack):
    engine = make_engine(stack.env["MIGRATION_DATABASE_URL"], pool_size=1)
    yield engine
    engine.dispose()


@pytest.fixture
def refused_word(owner):
    """A word that Postgres does not let into a row: what a bug of ours, or a broken disk, may do to any statement.

    but_in: it is let in with this.
    """
    word = f"unspeakable-{uuid.uuid4().hex}"

    def refused_word(*, but_in="false"):
        with transaction(owner) as session:
            condition = f"prompt NOT LIKE '%{word}%' OR {but_in}"
            session.execute(text(f"ALTER TABLE jobs ADD CONSTRAINT tests_refuse CHECK ({condition}) NOT VALID"))
        return word

    yield refused_word
    with transaction(owner) as session:
        session.execute(text("ALTER TABLE jobs DROP CONSTRAINT tests_refuse"))


def assert_in_no_log(stack, word, *, but_the_failure_in):
    """What went wrong is told there, and in Postgres's log, and the word in none."""
    for name in (but_the_failure_in, "postgres"):
        until(lambda name=name: "tests_refuse" in stack.log_path(name).read_text(errors="replace"), within_s=60, what=f"a line of {name}")
    for path in (stack.data_dir / "logs").iterdir():
        assert word not in path.read_text(errors="replace"), path.name


def test_a_prompt_that_the_gateway_cannot_write_is_in_no_log(stack, api, refused_word):
    word = refused_word()

    answer = api.post("/v1/jobs", json={"prompt": f"a portrait of {word}", "tier": "batch", "metadata": {"who": word}})

    assert word not in str(assert_problem(answer, 500, "unexpected"))
    assert_in_no_log(stack, word, but_the_failure_in="gateway")


def test_a_prompt_of_a_row_that_a_worker_cannot_write_is_in_no_log(stack, api, refused_word):
    word = refused_word(but_in="state <> 'succeeded'")
    negative = f"no {word}"

    job = api.post("/v1/jobs", json={"prompt": f"a portrait of {word}", "negative_prompt": negative, "tier": "fast", "steps": 1}).json()

    assert_in_no_log(stack, word, but_the_failure_in="results")
    api.post(job["urls"]["cancel"])


def test_log_lines_name_their_own_request_and_no_earlier_one_of_the_thread(gateway_with, new_key):
    gateway, key = gateway_with(), new_key()
    tenant_id = gateway.get("/v1/key", headers=bearer(key)).json["tenant_id"]

    told = []
    for request_id, headers in (("first", bearer(key)), ("second", {})):
        gateway.get("/v1/key", headers={"X-Request-Id": request_id, **headers})
        told.append(get_contextvars())

    assert told == [{"request_id": "first", "tenant_id": tenant_id}, {"request_id": "second"}]


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
