"""darkroom prune: says what would go, and removes it when told to."""

import gzip
import hashlib
import json
import re
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner
from sqlalchemy import text

from cli.main import darkroom
from models import files, jobs
from models.database import make_engine, transaction
from tests.builders import a_job, a_tenant
from tests.models.conftest import a_database
from tests.models.test_pruning import AUGUST, CUTOFF, age, append, count, verify


@pytest.fixture(scope="module")
def own_database(stack):
    with a_database(stack.env) as database:
        yield database


@pytest.fixture
def prune(own_database, tmp_path, monkeypatch):
    """Run the command on a database of one's own."""
    monkeypatch.setenv("MIGRATION_DATABASE_URL", own_database.owner_url)

    def prune(*arguments):
        return CliRunner().invoke(
            darkroom, ["--data-dir", str(tmp_path / "none"), "prune", *arguments]
        )

    return prune


@pytest.fixture
def old_job(own_database):
    """A job that was canceled a hundred days ago."""
    return an_old_job(own_database)


def an_old_job(own_database, **fields):
    engine = make_engine(own_database.owner_url, pool_size=1)
    with transaction(engine) as session:
        tenant = a_tenant(session)
        job = jobs.cancel(
            session, a_job(session, tenant=tenant, **fields).id, tenant_id=tenant.id, actor="tests"
        )
        old_id = age(session, job)
    engine.dispose()
    return old_id


def is_there(own_database, job_id) -> bool:
    with own_database.owner.connect() as connection:
        return count(connection, "jobs", id=job_id) == 1


def test_prune_only_says_what_would_go_unless_it_is_told_yes(own_database, prune, old_job):
    done = prune("--older-than", "30d")

    assert (done.exit_code, "would be removed" in done.stdout, "--yes" in done.stderr) == (
        0,
        True,
        True,
    )
    assert is_there(own_database, old_job)


def test_prune_removes_what_is_old_and_tells_how_much(own_database, prune, old_job):
    done = prune("--older-than", "30d", "--yes")

    assert (done.exit_code, done.output and "removed" in done.stdout) == (0, True)
    assert not is_there(own_database, old_job)
    assert prune("--older-than", "30d").stdout.split("jobs")[1].split()[0] == "0"


def an_old_file(own_database):
    """A file that was brought a hundred days ago, and that no job starts from."""
    engine = make_engine(own_database.owner_url, pool_size=1)
    shape = {"mode": "RGB", "size_bytes": 10, "width_px": 8, "height_px": 8}
    with transaction(engine) as session:
        tenant = a_tenant(session)
        file = files.keep(
            session,
            tenant_id=tenant.id,
            object_key="t/old",
            content_sha256="0" * 64,
            **shape,
            actor="tests",
        )
        session.execute(
            text("UPDATE files SET created_at = created_at - interval '100 days' WHERE id = :id"),
            {"id": file.id},
        )
        file_id = file.id
    engine.dispose()
    return file_id


def test_prune_of_one_tier_leaves_the_jobs_of_others_and_every_file(own_database, prune):
    jobs_of = {tier: an_old_job(own_database, tier=tier) for tier in ("fast", "batch")}
    file_id = an_old_file(own_database)

    def is_erased():
        with own_database.owner.connect() as connection:
            return connection.scalar(
                text("SELECT erased_at IS NOT NULL FROM files WHERE id = :id"), {"id": file_id}
            )

    would = prune("--older-than", "30d", "--tier", "batch")
    done = prune("--older-than", "30d", "--tier", "batch", "--yes")

    assert (would.exit_code, done.exit_code, "files" in would.stdout + done.stdout) == (0, 0, False)
    assert {tier for tier, job_id in jobs_of.items() if is_there(own_database, job_id)} == {"fast"}
    assert not is_erased()
    assert re.search(r"^files +1$", prune("--older-than", "30d", "--yes").stdout, re.MULTILINE)
    assert is_erased()


def test_prune_exports_months_of_the_audit_log_before_they_go(own_database, prune, tmp_path):
    with own_database.owner.begin() as connection:
        bounds = "FROM ('2001-08-01 00:00+00') TO ('2001-09-01 00:00+00')"
        connection.execute(
            text(f"CREATE TABLE audit_events_2001_08 PARTITION OF audit_events FOR VALUES {bounds}")
        )
    append(own_database, 'with "quotes" and \\ backslash', AUGUST, AUGUST)

    done = prune("--audit-older-than", "400d", "--export", str(tmp_path), "--yes")

    assert done.exit_code == 0, done.output
    path = tmp_path / "audit-2001-08.jsonl.gz"
    events = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert [(event["chain_id"], event["seq"]) for event in events] == [
        ('with "quotes" and \\ backslash', 1),
        ('with "quotes" and \\ backslash', 2),
    ]
    with own_database.owner.connect() as connection:
        facts = connection.scalar(
            text("SELECT facts FROM audit_log WHERE event = 'audit:month:pruned'")
        )
    assert facts["exported_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert verify(own_database) == []
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "say how old"),
        (["--older-than", "30"], "is not a number of days"),
        (["--older-than", "0d"], "1d or more"),
        (["--usage-older-than", "30d"], "62d or more"),
        (["--older-than", "30d", "--export", "/nonexistent"], "does not exist"),
    ],
)
def test_prune_names_what_it_cannot_use(prune, arguments, told):
    done = prune(*arguments)

    assert done.exit_code == 2
    assert told in done.stderr


def test_prune_waits_for_who_holds_a_lock_and_then_goes_on(
    own_database, prune, old_job, monkeypatch
):
    monkeypatch.setattr("cli.prune.PAUSE_S", 0.05)
    assert datetime.now(UTC) - CUTOFF > timedelta(days=29)

    with own_database.owner.connect() as busy:
        busy.execute(text("SELECT 1 FROM jobs WHERE id = :id FOR UPDATE"), {"id": old_job})
        assert prune("--older-than", "30d", "--yes").exit_code == 0  # it is left for the next time
        assert is_there(own_database, old_job)
    assert prune("--older-than", "30d", "--yes").exit_code == 0
    assert not is_there(own_database, old_job)
